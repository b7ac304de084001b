"""What may run code from a file is called in one module, with an explicit answer to the question whether it may."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support import ROOT

SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "vlm_cli").rglob("*.py"))}

TRUST = "vlm_cli/trust.py"
TORCH_FILES = "vlm_cli/checkpoint/torch_files.py"
OPENCLIP = "vlm_cli/checkpoint/parts/openclip.py"
REMOTE_CODE = "vlm_cli/checkpoint/parts/remote_code.py"
PLAIN_DATA = "vlm_cli/plain_data.py"  # limits bytes, depth and nodes, and answers in words
#: Modules that read JSON of no file, or of a line that has a limit of its own.
TEXTS_OF_OUR_OWN = tuple(
    f"vlm_cli/{name}.py"
    for name in (
        "checkpoint/parts/outside",
        "data/jsonl",
        "templates/process",
        "templates/render",
        "resume",
        "tokenizer",
    )
)

#: The last name of a call -> the modules that may make it.
HOMES: dict[str, tuple[str, ...]] = {
    "from_pretrained": (TRUST,),
    "from_config": (TRUST,),
    "for_model": (TRUST,),
    "pipeline": (),
    "get_class_from_dynamic_module": (REMOTE_CODE,),
    "get_kernel": (),
    "load_adapter": (),
    "load_custom_generate": (),
    "torch.load": (TORCH_FILES,),
    "torch.jit.load": (),
    "torch.hub.load": (),
    "np.load": (),
    "numpy.load": (),
    "pickle.load": (),
    "pickle.loads": (),
    "load_state_dict_from_url": (),
    "factory.load_state_dict": (),  # of OpenCLIP: it retries without weights_only
    "load_checkpoint": (OPENCLIP,),  # after `read_torch_file` has read the same file, or for NumPy's files
    "create_model": ("vlm_cli/modeling/encoders/timm.py",),  # names of timm's own models only
    "create_model_and_transforms": (),
    "create_model_from_pretrained": (),
    "yaml.load": (),
    "yaml.unsafe_load": (),
    "yaml.full_load": (),
    "json.load": (),
    "json.loads": (PLAIN_DATA, *TEXTS_OF_OUR_OWN),
    "yaml.safe_load": (),
    "eval": (),
    "exec": (),
    "__import__": (),
    "input": (),
}

#: Functions that fetch or open files, and hold no code.
HOMES |= {
    name: (
        TRUST,
        *(
            f"vlm_cli/checkpoint/{file}.py"
            for file in (
                "adapters",
                "backbones",
                "delta",
                "directory",
                "inside",
                "parts/hf_weights",
                "schemas/reading",
                "whole",
            )
        ),
    )
    for name in ("cached_file",)
}
READERS = ("safe_open", "load_file", "hf_hub_download", "snapshot_download", "download_pretrained")


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call with its dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def violations(path: str, source: str) -> list[str]:
    """The calls that a module may not make."""
    found = []
    for name, call in calls(source):
        for forbidden, homes in HOMES.items():
            same = name == forbidden or name.endswith(f".{forbidden}")
            if forbidden in ("eval", "exec", "input", "__import__"):
                same = name == forbidden
            if same and path not in homes and not _is_checked_override(name, source):
                found.append(f"{path}:{call.lineno} {name}")
        if name in READERS and not path.startswith(
            ("vlm_cli/checkpoint/", "vlm_cli/data/sources/hub.py", "vlm_cli/doctor/", "vlm_cli/training/features.py")
        ):
            found.append(f"{path}:{call.lineno} {name}")
    if path == TRUST:
        found += [f"{path}:{call.lineno} {name}" for name, call in calls(source) if _leaves_the_question(name, call)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "open_clip.factory":
            found += [f"{path}:{node.lineno} {x.name}" for x in node.names if x.name == "load_state_dict"]
    return found


def _is_checked_override(name: str, source: str) -> bool:
    """Say whether a class overrides `from_pretrained`, and checks its files before it calls the inherited one."""
    recursion = name == "cls.from_pretrained" and 'kwargs["trust_remote_code"] = bool(' in source
    return recursion or (name == "super().from_pretrained" and "check_code(pretrained_model_name_or_path" in source)


def _leaves_the_question(name: str, call: ast.Call) -> bool:
    """Say whether a loader of Transformers that can run code is called without `trust_remote_code`."""
    owner, _, method = name.rpartition(".")
    asks = method in ("from_pretrained", "from_config") and owner != "GenerationConfig"
    return asks and "trust_remote_code" not in {keyword.arg for keyword in call.keywords}


def test_no_module_loads_for_itself() -> None:
    assert [x for path, file in SOURCES.items() for x in violations(path, file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlm_cli/models.py", "AutoTokenizer.from_pretrained(name)"),
        ("vlm_cli/models.py", "AutoTokenizer.from_pretrained(name, trust_remote_code=False)"),
        ("vlm_cli/modeling/vlm.py", "AutoModelForCausalLM.from_config(config)"),
        ("vlm_cli/modeling/vlm.py", "super().from_pretrained(name)"),
        ("vlm_cli/modeling/config.py", "AutoConfig.for_model('llama')"),
        ("vlm_cli/training/run.py", "torch.load('state.pt', weights_only=True)"),
        ("vlm_cli/training/run.py", "hf_hub_download('org/name', 'state.pt')"),
        ("vlm_cli/checkpoint/parts/openclip.py", "open_clip.create_model('ViT-B-32')"),
        ("vlm_cli/checkpoint/parts/openclip.py", "from open_clip.factory import load_state_dict"),
        ("vlm_cli/checkpoint/delta.py", "yaml.load(text, yaml.Loader)"),
        ("vlm_cli/data/records.py", "eval(line)"),
        ("vlm_cli/checkpoint/directory.py", "json.loads(path.read_text())"),
        ("vlm_cli/checkpoint/delta.py", "json.load(file)"),
        ("vlm_cli/data/records.py", "np.load(file, allow_pickle=True)"),
        ("vlm_cli/cli/build.py", "input('Sure?')"),
        (TRUST, "AutoTokenizer.from_pretrained(name)"),
        (TRUST, "AutoModelForCausalLM.from_config(config)"),
    ],
)
def test_a_loader_in_another_place_is_noticed(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (TRUST, "AutoTokenizer.from_pretrained(name, trust_remote_code=trust)"),
        ("vlm_cli/models.py", "load_tokenizer(name)"),
        ("vlm_cli/models.py", "model.eval()"),
        ("vlm_cli/checkpoint/torch_files.py", "torch.load(path, weights_only=True)"),
    ],
)
def test_a_loader_in_its_place_is_not(path: str, source: str) -> None:
    assert not violations(path, source)
