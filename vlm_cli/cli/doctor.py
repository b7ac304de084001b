"""`vlm doctor`."""

from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import MAX_SEED, ComposeOptions, DeviceOptions, JsonOption, ModelArgument, flatten_options
from vlm_cli.composition import Composition
from vlm_cli.errors import VLMError
from vlm_cli.models import DEMO, hub_arguments, resolve

__all__ = ["doctor"]


@flatten_options
def doctor(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    devices: DeviceOptions = DeviceOptions(),
    quick: Annotated[bool, typer.Option("--quick", help="Only what a few passes over a short prompt show.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of prompts, images and drawn weights.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Prove on a model what holds for every model: its weights, its dtype, its device.

    A composition is built with random weights, and nothing is downloaded. Exit code 1 if a check fails.

    Example: vlm doctor my-flamingo --dtype bfloat16
    """
    chosen = resolve(model, compose.request)
    from vlm_cli.report.invariants import CHECKS, QUICK, check_invariants

    vlm = _model(chosen, compose, devices, seed)
    name = model or ("demo" if chosen == str(DEMO) else vlm.config.composition.family or "composition")
    dtype = str(vlm.dtype).removeprefix("torch.")
    console.notify(f"Model {name} on {vlm.device}, {dtype}")
    findings = []
    with console.step(quiet=as_json) as announce:
        for finding in check_invariants(vlm, QUICK if quick else tuple(CHECKS), seed=seed, progress=announce):
            findings.append(finding)
            if not as_json:
                print(_line(finding), flush=True)
    counts = {
        verdict: sum(f.verdict == verdict for f in findings) for verdict in ("holds", "limit", "skipped", "fails")
    }
    if as_json:
        console.print_json(
            {
                "model": name,
                "device": str(vlm.device),
                "dtype": dtype,
                "passed": not counts["fails"],
                "checks": [f.to_dict() for f in findings],
            }
        )
    else:
        print(", ".join(f"{count} {_WORDS[verdict]}" for verdict, count in counts.items() if count))
    if counts["fails"]:
        raise typer.Exit(1)


_WORDS = {
    "holds": "hold",
    "limit": "limited by the language model",
    "skipped": "skipped",
    "fails": "FAIL",
}


def _line(finding: Any) -> str:
    """Verdict, what it means, and the numbers."""
    numbers = []
    if finding.difference is not None:
        allowed = "" if finding.allowed is None else f" (allowed {finding.allowed:.1e})"
        numbers.append(f"difference {finding.difference:.1e}{allowed}")
    if finding.twin is not None:
        numbers.append(f"{finding.twin:.1e} after a change that must be seen")
    if finding.note:
        numbers.append(finding.note)
    verdict = "FAILS" if finding.verdict == "fails" else finding.verdict
    return f"{verdict:8}{finding.name:11}{finding.proves}\n{'':19}{'; '.join(numbers)}"


def _model(chosen: Composition | str, compose: ComposeOptions, devices: DeviceOptions, seed: int) -> Any:
    """The model to check, in evaluation mode.

    Raises:
        VLMError: if there is none, or too little memory for it.
    """
    from vlm_cli.checkpoint.create import create, plan
    from vlm_cli.checkpoint.directory import load
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    device, dtype = devices.resolve()
    if isinstance(chosen, str):
        return load(
            chosen,
            dtype=dtype,
            device=device,
            trust_remote_code=compose.trust_remote_code,
            **hub_arguments(compose.revision),
        )[0]
    blueprint = plan(chosen, trust_remote_code=compose.trust_remote_code, need_tokenizer=False)
    _check_memory(blueprint, dtype)
    console.notify("Weights are drawn at random; give a built directory to check its own.")
    return create(blueprint, random_weights=True, dtype=dtype, seed=seed).to(device)


def _check_memory(blueprint: Any, dtype: Any) -> None:
    """
    Raises:
        VLMError: if the weights alone would not fit.
    """
    import psutil

    from vlm_cli.report.parameters import count_parameters

    stored = blueprint.config.get_text_config().dtype if dtype == "auto" else dtype
    needed, free = count_parameters(blueprint.meta_model, dtype=stored).total.bytes, psutil.virtual_memory().available
    if needed > free:
        raise VLMError(
            f"the weights of this composition take {console.human_bytes(needed)}, and {console.human_bytes(free)} of "
            "memory are free. Choose a smaller language model of the same type, or --dtype bfloat16."
        )
