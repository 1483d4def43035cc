"""The options that commands share, parsed by typer as a user's words are."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cli.options.run import Model, run_options, takes_run_options
from cli.options.sampling import AskedSampling, takes_sampling
from offload.records import RunOptions, Sampling
from quant.errors import ProfileError, UsageError


def parse(*words: str) -> tuple[str, RunOptions, Sampling]:
    """What a command with all shared options is called with for these words, for a model that asks for nothing."""
    got: list[tuple[str, RunOptions, Sampling]] = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @takes_run_options
    @takes_sampling
    def command(model: Model, run: RunOptions, sampling: AskedSampling) -> None:
        got.append((model, run, sampling.of(Path(model), max_tokens=256)[0]))

    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return got[0]


def test_what_is_left_out_is_what_run_options_say_themselves() -> None:
    assert parse("m") == ("m", RunOptions(), Sampling())


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    profile = tmp_path / "r.json"
    profile.touch()
    _, run, _ = parse(
        "m",
        "--vram",
        "24GiB",
        "--ram",
        "1.5 GiB",
        "--context",
        "99",
        "--kv",
        "int8",
        "--kv-disk",
        str(tmp_path),
        "--kv-ram",
        "2GiB",
        "--kv-epsilon",
        "0.001",
        "--routing",
        str(profile),
        "--policy",
        "lru",
        "--device",
        "cpu",
        "--threads",
        "3",
        "--prompt-chunk",
        "7",
        "--exact",
        "--page-cache",
        "--warm",
        "8MiB",
        "--regain",
    )
    assert run == RunOptions(
        vram=24 * 2**30,
        ram=3 * 2**29,
        context=99,
        kv="int8",
        kv_disk=tmp_path,
        kv_ram=2 * 2**30,
        kv_epsilon=1e-3,
        device="cpu",
        policy="lru",
        routing=profile,
        prompt_chunk=7,
        exact=True,
        page_cache=True,
        threads=3,
        prefetch_bytes=2**23,
        regain=True,
    )


def test_reading_ahead_into_caches_can_be_turned_off() -> None:
    assert parse("m", "--warm", "0")[1].prefetch_bytes == 0


def test_every_sampling_option_reaches_the_sampler() -> None:
    _, _, sampling = parse(
        "m",
        "-n",
        "5",
        "--temperature",
        "0.7",
        "--top-k",
        "40",
        "--top-p",
        "0.9",
        "--min-p",
        "0.05",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "4",
        "--stop",
        "END",
        "--stop",
        "\n\n",
    )
    assert sampling == Sampling(
        max_tokens=5,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=4,
        stop=("END", "\n\n"),
    )


@pytest.mark.parametrize("words", [["--context", "0"], ["--threads", "0"], ["--device", "tpu"], ["--seed", "-1"]])
def test_values_out_of_range_are_wrong_usage(words: list[str]) -> None:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @takes_run_options
    @takes_sampling
    def command(model: Model, run: RunOptions, sampling: AskedSampling) -> None:
        raise AssertionError("the command must not run")

    assert CliRunner().invoke(app, ["m", *words]).exit_code == 2


def test_a_recipe_gives_what_is_left_out_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[weights]\nexperts = "int4"\n[run]\nram = "3GiB"\ncontext = 512\nkv = "int8"\n')
    _, run, _ = parse("m", "--recipe", str(recipe), "--context", "99")
    assert run == RunOptions(ram=3 * 2**30, context=99, kv="int8")


@pytest.mark.parametrize(
    ("policy", "message"), [("best", "no cache policy is called 'best'"), ("seeded", "give one with --routing")]
)
def test_a_policy_that_cannot_be_is_refused_before_anything_is_loaded(policy: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_options(policy=policy)


def test_a_profile_that_is_not_there_is_a_failure_before_anything_is_loaded() -> None:
    with pytest.raises(ProfileError, match="is no file: expected a profile"):
        run_options(routing=Path("absent.json"))
