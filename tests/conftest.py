"""Shared by all tests: the gpu marker, tiny checkpoints made once per session, the demo model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before transformers is imported anywhere: tests never reach for the network, and progress bars are noise.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Before Triton is: where there is no card (/dev/dxg: one behind WSL), its kernels run in its interpreter.
if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only here: collecting tests that need no GPU stays quick

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(family, **options)``: the folder of a tiny checkpoint (tests/checkpoints.py), made on first use.

    The folder is shared by the whole session: copy it before changing anything in it.
    """
    made: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        from tests import checkpoints

        key = f"{family} {sorted(options.items())}"
        if key not in made:
            dst = tmp_path_factory.mktemp(family) / "model"
            made[key] = checkpoints.make(family, dst, **options)  # type: ignore[arg-type]
        return made[key]

    return get


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained Llama 4 checkpoint that ships with the package."""
    return ROOT / "recipes" / "demo"
