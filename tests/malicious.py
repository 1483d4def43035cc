"""A model directory that tries to run its own Python."""

import json
from pathlib import Path

_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
    "generation_config.json": ("AutoModelForCausalLM",),
    "processor_config.json": ("AutoProcessor",),
    "preprocessor_config.json": ("AutoImageProcessor", "AutoProcessor"),
}


def make_malicious(folder: Path) -> Path:
    """Let every auto class of the model in ``folder`` be code beside it; the file that it makes if it is run."""
    mark = folder.parent / f"{folder.name}-was-run"
    code = f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name, kinds in _CLASSES.items():
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        if name == "tokenizer_config.json":
            values["tokenizer_class"] = "EvilTokenizer"
        values["auto_map"] = {kind: ["evil.Evil"] * 2 if kind == "AutoTokenizer" else "evil.Evil" for kind in kinds}
        file.write_text(json.dumps(values))
    return mark
