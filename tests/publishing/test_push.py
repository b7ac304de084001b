"""`vlm push`: what arrives at a hub on this machine, what the card tells, and what is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support import disk
from tests.support.hub_server import Repository, serving_here
from vlm_cli.publishing.push import PushOptions, prepare
from vlm_cli.report.card import UNTRAINED, training_story
from vlm_cli.report.card_sections import Card

RESULT = {
    "data": "/home/me/secret/questions.jsonl",
    "data_sha256": "a" * 64,
    "limit": 5,
    "max_new_tokens": 32,
    "metrics": {"exact": {"rule": "", "source": ""}},
    "model": "/home/me/model",
    "total": {"items": 5, "scores": {"exact": {"right": 4, "value": 0.8, "interval": [0.4, 0.95]}}},
}
RUN = {
    "job": {"model": "org/first", "data": {"sources": [{"data": "hf:org/data:train"}, {"data": "/home/me/x|y.jsonl"}]}},
    "settings": {"learning_rate": 0.001},
    "result": {"steps": 20, "records": 1000, "loss": 1.25, "eval_loss": None},
    "stages": [{"stage": "1-align", "job": {"model": "org/first", "data": "hf:org/captions"}, "result": {"steps": 7}}],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    lm, tower = disk.language_model(folder / "lm"), disk.tower(folder / "tower")
    return disk.write(folder / "model", disk.composition(f"local-dir:{tower}", str(lm), "mlp", "language-stream"))


@pytest.fixture
def model(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


@pytest.fixture
def hub():
    with serving_here() as found:
        yield found


@pytest.fixture
def push(vlm, model):
    return lambda *more: vlm("push", model, "me/model", *more)


def card_of(hub, name="me/model"):
    return Card.parse(hub.repositories[name].newest["README.md"].decode())


def edit(card, old, new):
    text = card.read_text()
    assert old in text
    card.write_text(text.replace(old, new, 1))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_model_is_sent_whole_in_one_commit(push, model, hub):
    (model / ".hidden").write_text("x")
    (model / "training_args.json").write_text("{}")
    result = push("--private", "--license", "mit", "--json")
    assert result.exit_code == 0, result.stderr
    repository = hub.repositories["me/model"]
    assert repository.private and len(repository.commits) == 2  # the empty one, and the model
    wanted = {path.name for path in model.iterdir()} - {".hidden", "training_args.json"}
    assert set(repository.newest) == wanted == set(json.loads(result.stdout)["files"])
    for name in wanted - {"README.md"}:
        assert repository.newest[name] == (model / name).read_bytes()


def test_a_dry_run_asks_nothing_of_the_hub(push, model, hub):
    result = push("--dry-run")
    assert result.exit_code == 0 and "model.safetensors" in result.stdout and "library_name: vlm-cli" in result.stdout
    assert hub.requests == [] and "Nothing was sent" in result.stderr
    facts = json.loads(push("--dry-run", "--json").stdout)
    assert facts["commit"] is None
    assert facts["files"]["model.safetensors"] == (model / "model.safetensors").stat().st_size


def test_a_broken_push_changes_nothing_and_the_next_one_goes_on(push, model, hub, vlm):
    shutil.copy(model / "model.safetensors", model / "second.safetensors")
    with (model / "second.safetensors").open("ab") as file:
        file.write(b"more")
    hub.breaks_after = 1
    result = push()
    assert result.exit_code == 1
    assert "cannot push to 'me/model': " in result.stderr and "The repository is as it was." in result.stderr
    assert "To go on, type the same command again: vlm " in result.stderr
    assert hub.repositories["me/model"].newest == {} and len(hub.large) == 1
    hub.breaks_after = None
    before = sum(x.startswith("PUT /lfs") for x in hub.requests)
    assert push().exit_code == 0
    assert sum(x.startswith("PUT /lfs") for x in hub.requests) - before == 1  # the other one is there already
    assert "second.safetensors" in hub.repositories["me/model"].newest


@pytest.mark.matrix
def test_a_second_push_deletes_what_an_earlier_model_had(push, model, hub):
    assert push().exit_code == 0
    repository = hub.repositories["me/model"]
    manifest = json.loads(repository.newest["vlm_manifest.json"])
    manifest["files"]["model-00001-of-00002.safetensors"] = {"bytes": 1, "sha256": "0" * 64}
    old = {"model-00001-of-00002.safetensors": b"x", "notes.txt": b"mine"}
    repository.commit({**repository.newest, **old, "vlm_manifest.json": json.dumps(manifest).encode()})
    assert push().exit_code == 0
    assert "model-00001-of-00002.safetensors" not in repository.newest and repository.newest["notes.txt"] == b"mine"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("files", "words", "code"),
    [
        ({"config.json": b'{"model_type": "llama"}', "x.bin": b""}, "holds something else than a model of vlm", 2),
        ({"data.csv": b"1"}, "(data.csv)", 2),
        ({".gitattributes": b"", "README.md": b"mine"}, "", 0),
        ({"config.json": b'{"model_type": "vlm"}'}, "", 0),
        ({"README.md": b"---\na: [\n---\n"}, "cannot be read", 1),
    ],
)
def test_a_repository_that_exists(push, hub, files, words, code):
    hub.repositories["me/model"] = Repository()
    hub.repositories["me/model"].commit(files)
    result = push()
    assert result.exit_code == code and words in result.stderr, result.stderr
    if code == 2:
        assert hub.repositories["me/model"].newest == files
        assert push("--force").exit_code == 0
        assert set(hub.repositories["me/model"].newest) > set(files)
        assert push("--private").exit_code == 2


@pytest.mark.matrix
def test_somebody_else_commits_meanwhile(push, hub, monkeypatch):
    assert push().exit_code == 0
    from vlm_cli.publishing import push as module

    def prepare_slowly(*given):
        if len(given) == 3:  # after the repository was opened
            hub.repositories["me/model"].commit({"new": b""})
        return prepare(*given)

    monkeypatch.setattr(module, "prepare", prepare_slowly)
    result = push()
    assert result.exit_code == 1 and hub.repositories["me/model"].newest == {"new": b""}


def test_what_cannot_be_sent(vlm, model, tmp_path, hub):
    for words, code, said in (
        ((tmp_path / "none", "me/x"), 2, "there is no directory"),
        ((tmp_path, "me/x"), 1, "has no config.json"),
        ((model, "no where"), 2, "ORG/NAME expects ORG/NAME, got 'no where'"),
        ((model, "me/x", "--card", "new"), 2, "unknown --card 'new'"),
        ((model, "me/x", "--dataset", "a b"), 2, "--dataset expects ORG/NAME"),
        ((model, "me/x", "--results", tmp_path / "r.json"), 2, "cannot read the results"),
    ):
        result = vlm("push", *words)
        assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
    (tmp_path / "outside").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "outside")
    assert "leads out of its directory" in vlm("push", model, "me/x").stderr
    (model / "notes.txt").unlink()
    (model / "model.safetensors").write_bytes(b"another")
    result = vlm("push", model, "me/x")
    assert result.exit_code == 1 and "me/x" not in hub.repositories


def test_a_delta_of_files_that_others_cannot_fetch_is_not_sent(vlm, built, tmp_path, hub):
    delta = tmp_path / "delta"
    assert vlm("build", delta, "--config", built / "composition.yaml", "--delta").exit_code == 0
    result = vlm("push", delta, "me/delta")
    assert result.exit_code == 2 and "nobody else can fetch its language model and vision encoder" in result.stderr
    assert f"Make it whole, and send that: vlm build OUT --from {delta}" in result.stderr
    assert hub.requests == []
    config = json.loads((delta / "config.json").read_text())
    for record in config["backbones"].values():  # as of parts of the hub
        record |= {"kind": "hub", "location": "org/part", "revision": "a" * 40}
    (delta / "config.json").write_text(json.dumps(config))
    notes = prepare(delta, PushOptions()).notes
    assert any(f"make it whole with vlm build OUT --from {delta}" in note for note in notes)
    (delta / "config.json").write_text(json.dumps({**config, "adapters": ["language_model"]}))
    notes = prepare(delta, PushOptions()).notes
    assert any(f"vlm export {delta} OUT --format merged" in note for note in notes)


def test_folders_that_the_card_shows_are_told(model, built):
    notes = prepare(model, PushOptions()).notes
    assert any(f"{built.parent / 'tower'} and {built.parent / 'lm'} of this machine" in note for note in notes)


def test_without_a_hub(push):
    result = push()  # the tests run offline
    assert result.exit_code == 2 and "cannot push to 'me/model': " in result.stderr and "hf auth login" in result.stderr


# -- the card ----------------------------------------------------------------------------------------------------------


def test_a_card_tells_parts_lineage_and_results(model, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    (model / "training_args.json").write_text(json.dumps(RUN))
    options = PushOptions(
        license="mit", languages=["en"], tags=["toy"], datasets=["me/own"], results=[tmp_path / "r.json"]
    )
    card = Card.parse(prepare(model, options).card)
    assert card.metadata["license"] == "mit" and card.metadata["language"] == ["en"]
    assert card.metadata["base_model"] == ["org/first"] and card.metadata["pipeline_tag"] == "image-text-to-text"
    assert card.metadata["datasets"] == ["org/captions", "org/data", "me/own"]
    assert card.metadata["library_name"] == "vlm-cli" and "toy" in card.metadata["tags"]
    [result] = card.metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.8 and result["dataset"]["name"] == "questions.jsonl"
    section = card.sections["record"]
    assert "| 1&#45;align |".replace("&#45;", "-") in section and "| 1,000 | 20 | 0.001 | 1.2500 |" in section
    assert "vlm eval MODEL --data questions.jsonl --metric exact --max-new-tokens 32 --limit 5" in section
    assert "/home/me" not in section and "x&#124;y.jsonl" in section  # no folder of this machine, and no other column


@pytest.mark.parametrize(
    "licences",
    [("mit", "mit", "mit"), ("mit", "apache-2.0", None), ("other", "other", None), (None, "mit", None)],
)
def test_the_licence_is_that_of_all_parts(tmp_path, built, licences):
    for name, licence in zip(("lm", "tower"), licences, strict=False):
        text = "" if licence is None else f"---\nlicense: {licence}\n---\n"
        (built.parent / name / "README.md").write_text(text)
    shipment = prepare(built, PushOptions())
    assert Card.parse(shipment.card).metadata.get("license") == licences[2]
    assert any("licence" in note for note in shipment.notes) == (licences[2] is None)
    assert Card.parse(prepare(built, PushOptions(license="gpl-3.0")).card).metadata["license"] == "gpl-3.0"


def test_parts_of_the_hub_are_asked_for_their_cards(model, hub, push):
    for name in ("org/lm", "org/tower"):
        hub.repositories[name] = Repository()
        hub.repositories[name].commit({"README.md": b"---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n"})
    config = json.loads((model / "config.json").read_text())
    config["composition"]["language_model"]["name"] = "org/lm"
    config["composition"]["vision_encoder"]["name"] = "hf-hub:org/tower"
    (model / "config.json").write_text(json.dumps(config))
    assert push().exit_code == 0
    metadata = card_of(hub).metadata
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", ["en", "de"])
    assert set(metadata["base_model"]) >= {"org/lm", "org/tower"}


@pytest.mark.matrix
def test_names_that_the_hub_does_not_have_are_no_base_models(model, hub, push):
    """A directory of another machine, and a part that `vlm build` named in the card, may look like repositories."""
    config = json.loads((model / "config.json").read_text())
    config["composition"]["language_model"]["name"] = "org/gone"
    (model / "config.json").write_text(json.dumps(config))
    (model / "training_args.json").write_text(json.dumps({**RUN, "stages": [], "job": {"model": "start/model"}}))
    edit(model / "README.md", "---\n", "---\nbase_model:\n- org/gone\n- me/own\n")
    assert push().exit_code == 0
    assert card_of(hub).metadata["base_model"] == ["me/own"]
    hub.repositories["org/gone"] = hub.repositories["start/model"] = hub.repositories["me/model"]
    assert push().exit_code == 0
    assert sorted(card_of(hub).metadata["base_model"]) == ["me/own", "org/gone", "start/model"]


def test_the_card_names_no_file_that_stays_here(model):
    trained: Any = SimpleNamespace(trained_names=lambda: ["fusion"])
    story = training_story(trained, steps=1, records=2, loss=1.0, eval_loss=None)
    (model / "training_args.json").write_text("{}")
    (model / "loss.png").write_bytes(b"")
    edit(model / "README.md", UNTRAINED, story)
    shipment = prepare(model, PushOptions())
    assert "`loss.png`" in shipment.card and "loss.png" in shipment.files
    assert "training_args.json" not in shipment.card


@pytest.mark.matrix
def test_parts_with_random_weights_are_no_base_models(model, hub, push):
    hub.repositories["org/lm"] = Repository()
    hub.repositories["org/lm"].commit({"README.md": b"x"})
    config = json.loads((model / "config.json").read_text())
    config["composition"]["language_model"]["name"] = "org/lm"
    for random, bases in ((True, None), (None, ["org/lm"])):
        (model / "config.json").write_text(json.dumps(config | ({"random_weights": True} if random else {})))
        assert push().exit_code == 0
        assert card_of(hub).metadata.get("base_model") == bases


def test_what_a_person_wrote_into_the_card_stays(push, model, hub):
    edit(model / "README.md", "library_name: vlm-cli", "library_name: vlm-cli\nlicense: mit\nmine: [1]")
    with (model / "README.md").open("a") as file:
        file.write("\n## My notes\n\nHand-made.\n")
    assert push("--tag", "new").exit_code == 0
    card = card_of(hub)
    assert "Hand-made." in card.own_text and card.metadata["mine"] == [1] and card.metadata["license"] == "mit"
    assert "new" in card.metadata["tags"]
    assert "model" in card.sections


def test_an_edited_section_stays_and_is_told(model):
    (model / "training_args.json").write_text(json.dumps(RUN))
    (model / "README.md").write_text(prepare(model, PushOptions()).card)
    edit(model / "README.md", "## How it was trained", "## How I trained it")
    (model / "training_args.json").write_text(json.dumps({**RUN, "stages": []}))
    shipment = prepare(model, PushOptions())
    assert "## How I trained it" in shipment.card and "## How it was trained" not in shipment.card
    assert any("somebody edited what vlm wrote" in note for note in shipment.notes)


@pytest.mark.matrix
def test_a_card_that_was_edited_on_the_hub_stays(push, model, hub):
    assert push().exit_code == 0
    repository = hub.repositories["me/model"]
    text = repository.newest["README.md"].decode().replace("pipeline_tag", "license: mit\npipeline_tag", 1)
    repository.commit({**repository.newest, "README.md": f"{text}\nFrom the web page.\n".encode()})
    result = push()
    assert result.exit_code == 0 and "somebody wrote into the card of me/model stays" in result.stderr
    assert card_of(hub).own_text == "From the web page." and card_of(hub).metadata["license"] == "mit"
    with (model / "README.md").open("a") as file:
        file.write("\nFrom here.\n")
    result = push()
    assert result.exit_code == 1 and "--card local" in result.stderr and "--card hub" in result.stderr
    assert push("--card", "hub").exit_code == 0 and card_of(hub).own_text == "From the web page."
    assert push("--card", "local").exit_code == 0 and card_of(hub).own_text == "From here."


def test_results_are_replaced_one_by_one(model, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    other = json.loads(json.dumps(RESULT)) | {"data": "b.jsonl"}
    (model / "README.md").write_text(prepare(model, PushOptions(results=[tmp_path / "r.json"])).card)
    (tmp_path / "r.json").write_text(json.dumps(other))
    (model / "README.md").write_text(prepare(model, PushOptions(results=[tmp_path / "r.json"])).card)
    other["total"]["scores"]["exact"]["value"] = 0.5
    (tmp_path / "r.json").write_text(json.dumps(other))
    card = Card.parse(prepare(model, PushOptions(results=[tmp_path / "r.json"])).card)
    found = {x["dataset"]["name"]: x["metrics"][0]["value"] for x in card.metadata["model-index"][0]["results"]}
    assert found == {"questions.jsonl": 0.8, "b.jsonl": 0.5}


@pytest.mark.parametrize("data", [[], {"data": 1}, {"models": []}, {**RESULT, "total": {"items": 1, "scores": {}}}])
def test_a_file_that_holds_no_results(model, tmp_path, vlm, data):
    (tmp_path / "r.json").write_text(json.dumps(data))
    result = vlm("push", model, "me/x", "--results", tmp_path / "r.json", "--dry-run")
    assert result.exit_code == 2 and "vlm eval MODEL --data FILE --json > results.json" in result.stderr


HOSTILE = "<!-- /vlm:record -->|\n# `x` <script>\x1b[31m"


def test_names_from_files_format_nothing(model, tmp_path):
    job = {"model": HOSTILE, "data": HOSTILE}
    run = {**RUN, "job": job, "stages": [{"stage": HOSTILE, "job": job}]}
    (model / "training_args.json").write_text(json.dumps(run))
    result = {**RESULT, "data": HOSTILE, "metrics": {HOSTILE: {}}}
    result["total"] = {"items": 1, "scores": {HOSTILE: {"value": 1.0}}}
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = prepare(model, PushOptions(results=[tmp_path / "r.json"], tags=[HOSTILE], license=HOSTILE)).card
    card = Card.parse(text)
    assert card.metadata["license"] == HOSTILE and HOSTILE in card.metadata["tags"]  # quoted, as YAML does
    assert card.own_text == "" and set(card.sections) == {"model", "record"} and not card.edited
    assert "<script>" not in card.body and "\x1b" not in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == HOSTILE
