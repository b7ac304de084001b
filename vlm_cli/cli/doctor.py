"""`vlm doctor`: check on a model what must hold for every model."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlm_cli.cli import console
from vlm_cli.cli.manifest import compare_files, sign_files
from vlm_cli.cli.options import (
    MAX_SEED,
    BackboneOptions,
    ComposeOptions,
    DeviceOptions,
    JsonOption,
    ModelArgument,
    QuietOption,
    flatten_options,
)
from vlm_cli.cli.terminal import is_terminal, overwrite_line
from vlm_cli.composition import Composition
from vlm_cli.errors import VLMError
from vlm_cli.models import DEMO, hub_arguments, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from vlm_cli.checkpoint.create import Blueprint
    from vlm_cli.doctor import Finding
    from vlm_cli.modeling.vlm import VLM

__all__ = ["doctor"]

#: Verdict -> the word in the last line, in the order of that line.
_WORDS = {
    "holds": "hold",
    "limit": "limited by the language model",
    "skipped": "skipped",
    "fails": "FAIL",
}

_CLAIM_COLUMNS = 42  # the longest claim

#: Verdict -> the mark before the check's name, and its colour.
_MARKS = {"holds": ("✓", "green"), "limit": ("–", "yellow"), "skipped": ("·", "yellow"), "fails": ("✗", "red")}


@flatten_options
def doctor(
    model: ModelArgument = None,
    compose: ComposeOptions = ComposeOptions(),
    devices: DeviceOptions = DeviceOptions(),
    places: BackboneOptions = BackboneOptions(),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run only the checks that need a few passes over a short prompt.")
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Seed for prompts, images and random weights.")
    ] = 0,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print for each check what it proves, its numbers, reason and seconds."),
    ] = False,
    sign: Annotated[
        bool,
        typer.Option(
            "--sign",
            help="Write the manifest of the directory MODEL anew, after you edited its files on purpose, and run no "
            "checks.",
        ),
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check what must hold for every model. The checks use the model's own weights, dtype and device.

    Each check compares two ways to compute the same logits, and then makes a change that it must notice. If MODEL is a
    composition, it gets random weights and nothing is downloaded. Exit code 1 if a check fails.

    Example: vlm doctor my-flamingo --dtype bfloat16
    """
    chosen = resolve(model, compose.request)
    if sign:
        sign_files(chosen, as_json)
        return
    from vlm_cli.doctor import CHECKS, QUICK, check_invariants, uses_of_tf32

    if isinstance(chosen, str):
        compare_files(chosen, verbose)
    vlm, tokenizer = _model(chosen, compose, devices, places, seed)
    name = model or ("demo" if chosen == str(DEMO) else vlm.config.composition.family or "composition")
    dtype = str(vlm.dtype).removeprefix("torch.")
    console.note(f"Model {name} on {vlm.device}, {dtype}")
    if vlm.device.type == "cuda":
        console.note(_tell_tf32(uses_of_tf32()))
    names = QUICK if quick else tuple(CHECKS)
    findings = []
    announce = (lambda text: None) if as_json else _announce
    for finding in check_invariants(vlm, names, tokenizer=tokenizer, seed=seed, progress=announce):
        findings.append(finding)
        if as_json:
            continue
        _announce("")
        width = max(map(len, names))
        claim = CHECKS[finding.name].claim_for(vlm)
        if verbose:
            console.print_lines(_details(finding, width) + "\n")
        else:
            console.print_marked(*_MARKS[finding.verdict], _summary(finding, width, claim))
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _WORDS}
    if as_json:
        console.print_json(
            {
                "model": name,
                "device": str(vlm.device),
                "dtype": dtype,
                "tf32": False,  # while checks run
                "passed": not counts["fails"],
                "checks": [f.to_dict() for f in findings],
            }
        )
    else:
        console.print_line(", ".join(f"{count} {_WORDS[verdict]}" for verdict, count in counts.items() if count))
    if counts["fails"]:
        raise typer.Exit(1)


def _tell_tf32(uses: Sequence[str]) -> str:
    elsewhere = f"elsewhere torch uses it in {' and '.join(uses)}" if uses else "and torch uses it nowhere else"
    return f"TF32 is off while the checks run; {elsewhere}."


def _announce(text: str) -> None:
    """Show on a terminal which check runs, on a line that the next text or the check's result replaces."""
    if is_terminal(sys.stderr) and not console.is_quiet():
        overwrite_line(f"  {text} …" if text else "", end="\r")


def _summary(finding: Finding, width: int, claim: str) -> str:
    """Return a line: name (in `width` columns), claim and numbers. If the check does not hold, its reason follows.

    Args:
        finding: of the check.
        width: of the longest name.
        claim: what the check compares, in a few words.
    """
    line = f"{finding.name:{width}}  {claim:{_CLAIM_COLUMNS}}  {_compare(finding)}".rstrip()
    reasons = console.wrapped(finding.note, width + 4) if finding.verdict != "holds" else []
    return "\n".join([line, *reasons])


def _compare(finding: Finding) -> str:
    """Write the difference of a check beside the largest one that is allowed; without one, the verdict."""
    difference, allowed = finding.difference, finding.allowed
    if difference is None or allowed is None or not math.isfinite(difference):
        return "" if finding.verdict == "holds" else "FAILS" if finding.verdict == "fails" else finding.verdict
    return f"{_number(difference)} {'≤' if difference <= allowed else '>'} {_number(allowed)}"


def _number(number: float) -> str:
    return "0" if number == 0 else f"{number:.1e}"


def _details(finding: Finding, width: int) -> str:
    """Return two lines: verdict, name (in `width` columns) and what it proves; numbers, reason and seconds."""
    numbers = []
    if finding.difference is not None:
        allowed = "" if finding.allowed is None else f" (allowed {finding.allowed:.1e})"
        numbers.append(f"difference {finding.difference:.1e}{allowed}")
    if finding.twin is not None:
        numbers.append(f"{finding.twin:.1e} after a change that must be seen")
    if finding.note:
        numbers.append(finding.note)
    numbers.append(f"{finding.seconds:.1f} s")
    verdict = "FAILS" if finding.verdict == "fails" else finding.verdict
    return f"{verdict:8}{finding.name:{width}}  {finding.proves}\n{'':{10 + width}}{'; '.join(numbers)}"


def _model(
    chosen: Composition | str, compose: ComposeOptions, devices: DeviceOptions, places: BackboneOptions, seed: int
) -> tuple[VLM, Tokenizer | None]:
    """Load a directory, or build a composition with random weights; with its tokenizer, if it has one.

    Raises:
        VLMError: if the model cannot be found or built, or memory is too small for it.
    """
    from vlm_cli.checkpoint.create import create, plan
    from vlm_cli.checkpoint.directory import load
    from vlm_cli.quiet import silence_libraries

    silence_libraries()
    device, dtype = devices.resolve()
    if isinstance(chosen, str):
        model, processor = load(
            chosen,
            dtype=dtype,
            device=device,
            trust_remote_code=compose.trust_remote_code,
            backbones=places.backbones,
            allow_hosts=places.allow_hosts,
            verify=not Path(chosen).is_dir(),  # compared already
            **hub_arguments(compose.revision),
        )
        return model, processor.tokenizer
    blueprint = plan(chosen, trust_remote_code=compose.trust_remote_code, need_tokenizer=False)
    _check_memory(blueprint, dtype)
    console.note("The weights are random. To check trained weights, give the directory that `vlm build` wrote.")
    return create(blueprint, random_weights=True, dtype=dtype, seed=seed).to(device), blueprint.tokenizer


def _check_memory(blueprint: Blueprint, dtype: torch.dtype | str) -> None:
    """Refuse a composition that does not fit into memory.

    Raises:
        VLMError: if its weights alone are larger than the free memory.
    """
    import psutil

    from vlm_cli.modeling.config import stored_dtype
    from vlm_cli.report.parameters import count_parameters

    stored = stored_dtype(blueprint.config.get_text_config()) if isinstance(dtype, str) else dtype
    needed, free = count_parameters(blueprint.meta_model, dtype=stored).total.bytes, psutil.virtual_memory().available
    if needed > free:
        raise VLMError(
            f"the weights of this composition take {console.human_bytes(needed)}, and {console.human_bytes(free)} of "
            "memory are free. Choose a smaller language model of the same type, or --dtype bfloat16."
        )
