"""Benchmarks in the form in which they are published, on rows of our own."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.markdown import blocks, table
from vlm_cli.data.formats import BENCHMARKS, recognise, recognise_question
from vlm_cli.data.formats.format import ANSWERED
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.record import Record
from vlm_cli.data.records import Records, raise_problems, read_records
from vlm_cli.data.sources import Embedded
from vlm_cli.errors import DataError
from vlm_cli.evaluation.metrics import METRICS
from vlm_cli.prompt import Medium, Text

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(file, "PNG")
    return file.getvalue()


def base64_of(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def save_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def save_tab(path: Path, rows: list[dict[str, Any]]) -> Path:
    def cell(value: Any) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set('\t\n"') else text

    lines = ["\t".join(rows[0]), *("\t".join(cell(row.get(key, "")) for key in rows[0]) for row in rows)]
    return save(path, "\n".join(lines) + "\n")


def vqav2(path: Path) -> Path:
    answers = [
        {"answer": x, "answer_confidence": "yes", "answer_id": i} for i, x in enumerate(["net"] * 7 + ["mesh"] * 3)
    ]
    annotation = {"question_type": "what is", "multiple_choice_answer": "net", "answers": answers, "image_id": 42}
    head = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_subtype": "val2014"}
    questions = [{"image_id": 42, "question": "What is this?", "question_id": 42000}]
    save(path / "COCO_val2014_000000000042.jpg", picture())
    annotations = [{**annotation, "answer_type": "other", "question_id": 42000}]
    save(path / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    return save(
        path / "v2_OpenEnded_mscoco_val2014_questions.json",
        {**head, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions},
    )


def textvqa(path: Path) -> Path:
    save(path / "003a8ae2.jpg", picture())
    row = {
        "question": "what is the brand?",
        "image_id": "003a8ae2",
        "image_classes": ["Cassette deck"],
        "image_width": 9,
        "answers": ["gosses", *["dakota"] * 9],
        "question_tokens": ["what"],
        "question_id": 34602,
        "set_name": "val",
    }
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return save(path / "TextVQA_0.5.1_val.json", {**head, "data": [row]})


def gqa(path: Path) -> Path:
    save(path / "n161313.jpg", picture())
    types = {"detailed": "weather", "semantic": "global", "structural": "verify"}
    row = {"semantic": [], "question": "Is it overcast?", "imageId": "n161313", "isBalanced": True, "types": types}
    return save(path / "val.json", {"201307251": {**row, "answer": "no", "fullAnswer": "No, it is clear."}})


def scienceqa(path: Path) -> Path:
    save(path / "test" / "5" / "image.png", picture())
    row = {
        "question": "Which is solid?",
        "choices": ["water", "ice"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
    }
    more = {"subject": "natural science", "lecture": "", "solution": "", "skill": "x", "split": "test"}
    return save(path / "problems.json", {"5": {**row, **more}, "6": {**row, **more, "image": None, "hint": ""}})


def scienceqa_parquet(path: Path) -> Path:
    image = {"bytes": picture(), "path": None}
    row = {"image": image, "question": "Which is solid?", "choices": ["water", "ice"], "answer": 1, "hint": "Look."}
    return save_table(path / "test.parquet", [{**row, "subject": "natural science", "lecture": "", "solution": ""}])


def pope(path: Path) -> Path:
    save(path / "COCO_val2014_000000310196.jpg", picture())
    row = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
    return save(path / "coco_pope_random.json", json.dumps({**row, "label": "yes"}) + "\n")


def pope_parquet(path: Path) -> Path:
    image = {"bytes": picture(), "path": "a.jpg"}
    row = {"id": "0", "question_id": "1", "question": "Is there a snowboard in the image?", "answer": "yes"}
    return save_table(path / "a.parquet", [{**row, "image_source": "COCO", "image": image, "category": "random"}])


MME_LINES = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"


def mme(path: Path) -> Path:
    save(path / "release" / "color" / "0001.jpg", picture())
    save(path / "release" / "color" / "0001.txt", MME_LINES)
    return path / "release"


def mme_nested(path: Path) -> Path:
    save(path / "release" / "artwork" / "images" / "01.jpg", picture())
    save(path / "release" / "artwork" / "questions_answers_YN" / "01.txt", MME_LINES)
    return path / "release"


def mme_rows(image: Any) -> list[dict[str, Any]]:
    lines = [line.split("\t") for line in MME_LINES.splitlines()]
    same = {"question_id": "color/0001.png", "image": image, "category": "color"}
    return [{"index": i, **same, "question": q, "answer": a} for i, (q, a) in enumerate(lines)]


def mme_parquet(path: Path) -> Path:
    return save_table(path / "mme.parquet", mme_rows({"bytes": picture(), "path": None}))


def mme_tsv(path: Path) -> Path:
    return save_tab(path / "MME.tsv", mme_rows(base64_of("red")))


def mme_paths(path: Path) -> Path:
    """A table of VLMEvalKit: both rows hold the picture, and "image_path" names it."""
    rows = [{**row, "image_path": "images/color/0001.png"} for row in mme_rows(base64_of("red"))]
    return save_tab(path / "MME.tsv", [{k: x for k, x in row.items() if k != "question_id"} for row in rows])


def mme_unnamed(path: Path) -> Path:
    rows = [{k: x for k, x in row.items() if k != "question_id"} for row in mme_rows(base64_of("red"))]
    return save_tab(path / "MME.tsv", rows)


def pope_tsv(path: Path) -> Path:
    row = {"index": 0, "question": "Is there a snowboard in the image?", "answer": "yes", "category": "random"}
    return save_tab(path / "POPE.tsv", [{**row, "image": base64_of("red")}])


def mmbench(path: Path) -> Path:
    row = {"index": 241, "question": 'Which "one"\nis it?', "hint": "A\thint", "A": "cat", "B": "dog", "C": "", "D": ""}
    row |= {"answer": "B", "category": "identity", "image": base64_of("red"), "split": "dev"}
    return save_tab(
        path / "mmbench_dev.tsv", [row, {**row, "index": 1000241, "image": "241", "answer": "A", "hint": "nan"}]
    )


def mmmu(path: Path) -> Path:
    images = {f"image_{i}": {"bytes": picture(x), "path": None} for i, x in ((1, "red"), (2, "blue"))}
    images["image_3"] = {"bytes": None, "path": None}
    row = {"id": "validation_Art_Theory_1", "question": "<image 1> or <image 2>?", "options": "['a', \"<image 2> b\"]"}
    row |= {**images, "answer": "B", "question_type": "multiple-choice", "subfield": "x"}
    open_row = {**row, "id": "validation_Art_Theory_2", "options": "[]", "answer": "['12', 'twelve']"}
    return save_table(
        path / "mmmu.parquet", [row, {**open_row, "question_type": "open", "question": "How many <image 1>?"}]
    )


def mmstar_rows(image: Any) -> list[dict[str, Any]]:
    question = "Which option is it?\nOptions: A: a cat, or two, B: a dog, C: none, D: both"
    return [
        {"index": 0, "question": question, "image": image, "answer": "C", "category": "coarse", "l2_category": "scene"}
    ]


def mmstar(path: Path) -> Path:
    return save_table(path / "val.parquet", mmstar_rows({"bytes": picture(), "path": None}))


def mmstar_tsv(path: Path) -> Path:
    return save_tab(path / "MMStar.tsv", mmstar_rows(base64_of("red")))


def mmstar_columns(path: Path) -> Path:
    """The table of VLMEvalKit: a column for each choice, as in MMBench."""
    row = {"index": 0, "question": "<image 1> Which option is it?", "A": "a cat, or two", "B": "a dog", "C": "none"}
    more = {"D": "both", "answer": "C", "category": "coarse", "l2_category": "scene", "image": base64_of("red")}
    return save_tab(path / "MMStar.tsv", [{**row, **more}])


def mmstar_lines(path: Path) -> Path:
    """As those questions of MMStar that come from MathVista."""
    question = "Hint: Give the letter.\nQuestion: Which option is it?\nChoices:\n(A) a cat, or two\n(B) X: Y\n(C) none"
    return save_table(
        path / "val.parquet", [{**mmstar_rows({"bytes": picture(), "path": None})[0], "question": question}]
    )


def docvqa(path: Path) -> Path:
    save(path / "documents" / "pybv0228_81.png", picture())
    row = {"questionId": 49153, "question": "What is the date?", "question_types": ["form"], "docId": 5}
    row |= {"image": "documents/pybv0228_81.png", "answers": ["1/8/93", "1/8/1993"], "data_split": "val"}
    head = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return save(path / "val_v1.0.json", json.dumps({**head, "data": [row]}, indent=2))


def chartqa(path: Path) -> Path:
    save(path / "41.png", picture())
    return save(path / "test_human.json", [{"imgname": "41.png", "query": "How many bars?", "label": "14"}])


def chartqa_parquet(path: Path) -> Path:
    row = {"image": {"bytes": picture(), "path": None}, "query": "How many bars?", "label": ["14"]}
    return save_table(path / "test.parquet", [{**row, "human_or_machine": "human"}])


def chartqa_numbered(path: Path) -> Path:
    row = {"image": {"bytes": picture(), "path": None}, "query": "How many bars?", "label": ["14"]}
    return save_table(path / "test.parquet", [{**row, "human_or_machine": 1}])


def chartqa_typed(path: Path) -> Path:
    row = {"type": "human_test", "question": "How many bars?", "answer": "14"}
    return save_table(path / "test.parquet", [{**row, "image": {"bytes": picture(), "path": None}}])


def coco(path: Path) -> Path:
    save(path / "COCO_val2014_000000000007.jpg", picture())
    images = [{"license": 3, "file_name": "COCO_val2014_000000000007.jpg", "id": 7, "height": 7, "width": 9}]
    captions = [{"image_id": 7, "id": i, "caption": x} for i, x in enumerate(["A cat.", "Some cat."])]
    return save(path / "captions_val2014.json", {"info": {}, "images": images, "licenses": [], "annotations": captions})


SOLID, LESSON = f"Context: Look.\nWhich is solid?\nA. water\nB. ice{LETTER}", ("water", "ice")
STAR = f"Which option is it?\nA. a cat, or two\nB. a dog\nC. none\nD. both{LETTER}"
STAR_LINES = f"Hint: Give the letter.\nQuestion: Which option is it?\nA. a cat, or two\nB. X: Y\nC. none{LETTER}"
STAR_CHOICES = ("a cat, or two", "a dog", "none", "both")
BENCH = f'Context: A\thint\nWhich "one"\nis it?\nA. cat\nB. dog{LETTER}'
RED, CAPTION = "Is it red? Please answer yes or no.", "Provide a one-sentence caption for the provided image."
SNOW, BARS = f"Is there a snowboard in the image?{SHORT}", f"How many bars?{SHORT}"

Form = Callable[[Path], Path]
Texts = tuple[str, ...]
#: The file, the name of the benchmark, and of its first question: prompt, answer, answers, choices, id, kind.
FORMS: dict[Form, tuple[str, str, str, Texts, Texts, str, str | None]] = {
    vqav2: ("VQAv2", f"What is this?{SHORT}", "net", ("net",) * 7 + ("mesh",) * 3, (), "42000", "other"),
    textvqa: ("TextVQA", f"what is the brand?{SHORT}", "dakota", ("gosses", *["dakota"] * 9), (), "34602", None),
    gqa: ("GQA", f"Is it overcast?{SHORT}", "no", (), (), "201307251", "verify"),
    scienceqa: ("ScienceQA", SOLID, "B", (), LESSON, "5", "natural science"),
    scienceqa_parquet: ("ScienceQA", SOLID, "B", (), LESSON, "row 1", "natural science"),
    pope: ("POPE", SNOW, "yes", (), (), "1", None),
    pope_parquet: ("POPE", SNOW, "yes", (), (), "1", "random"),
    mme: ("MME", RED, "Yes", (), (), "line 1", "color"),
    mme_nested: ("MME", RED, "Yes", (), (), "line 1", "artwork"),
    mme_parquet: ("MME", RED, "Yes", (), (), "0", "color"),
    mme_tsv: ("MME", RED, "Yes", (), (), "0", "color"),
    mme_paths: ("MME", RED, "Yes", (), (), "0", "color"),
    mme_unnamed: ("MME", RED, "Yes", (), (), "0", "color"),
    pope_tsv: ("POPE", SNOW, "yes", (), (), "row 1", "random"),
    mmbench: ("MMBench", BENCH, "B", (), ("cat", "dog"), "241", "identity"),
    mmmu: ("MMMU", f" or ?\nA. a\nB. <image 2> b{LETTER}", "B", (), ("a", "<image 2> b"), "validation_Art_Theory_1",
           "Art_Theory"),
    mmstar: ("MMStar", STAR, "C", (), STAR_CHOICES, "0", "coarse"),
    mmstar_tsv: ("MMStar", STAR, "C", (), STAR_CHOICES, "0", "coarse"),
    mmstar_columns: ("MMBench", STAR, "C", (), STAR_CHOICES, "0", "coarse"),
    mmstar_lines: ("MMStar", STAR_LINES, "C", (), ("a cat, or two", "X: Y", "none"), "0", "coarse"),
    docvqa: ("DocVQA", f"What is the date?{SHORT}", "1/8/93", ("1/8/93", "1/8/1993"), (), "49153", "form"),
    chartqa: ("ChartQA", BARS, "14", ("14",), (), "element 1", None),
    chartqa_parquet: ("ChartQA", BARS, "14", ("14",), (), "row 1", "human"),
    chartqa_numbered: ("ChartQA", BARS, "14", ("14",), (), "row 1", "machine"),
    chartqa_typed: ("ChartQA", BARS, "14", ("14",), (), "row 1", "human"),
    coco: ("COCO captions", CAPTION, "A cat.", ("A cat.", "Some cat."), (), "7", None),
}  # fmt: skip


def good(path: Path) -> Records:
    records = read_records(path)
    raise_problems(records)
    return records


def prompt_of(record: Record) -> str:
    return "".join(part.text for part in record.segments[0].parts if isinstance(part, Text))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_file_as_it_is_published(form: Form, tmp_path: Path) -> None:
    name, prompt, answer, answers, choices, identity, kind = FORMS[form]
    records = good(form(tmp_path))
    first = records.good[0]
    assert (first.format, prompt_of(first), first.segments[1].parts) == (name, prompt, (Text(answer),))
    assert (first.marking.answers, first.marking.choices, first.id, first.kind) == (answers, choices, identity, kind)
    assert first.is_turns
    for medium in first.sources:
        assert records.loader().load(medium.source).image.getpixel((0, 0)) in ((255, 0, 0), (254, 0, 0), (0, 0, 255))
    assert len(first.sources) == (2 if name == "MMMU" else 1)
    benchmark = next(x for x in BENCHMARKS if x.name == name)
    assert first.marking.metric == benchmark.metric and benchmark.metric in METRICS


def test_each_benchmark_is_tested() -> None:
    assert {x[0] for x in FORMS.values()} == {x.name for x in BENCHMARKS}


def test_vqa_by_its_answers(tmp_path: Path) -> None:
    questions = vqav2(tmp_path)
    other = good(tmp_path / "v2_mscoco_val2014_annotations.json").good[0]
    assert other.segments == good(questions).good[0].segments


def test_the_answers_belong_to_what_a_run_remembers(tmp_path: Path) -> None:
    questions, answers = vqav2(tmp_path), tmp_path / "v2_mscoco_val2014_annotations.json"
    before = good(questions).sha256
    answers.write_text(answers.read_text().replace("mesh", "grid"))
    assert good(questions).sha256 != before


def test_a_picture_of_another_row(tmp_path: Path) -> None:
    records = good(mmbench(tmp_path))
    first, second = records.good
    assert [x.segments[1].parts[0].text for x in records.good] == ["B", "A"]  # type: ignore[union-attr]
    assert "hint" not in prompt_of(second)
    assert (
        records.loader().read(second.sources[0].source) == picture() == records.loader().read(first.sources[0].source)
    )


def test_pictures_of_mmmu_stand_where_they_are_named(tmp_path: Path) -> None:
    first, second = good(mmmu(tmp_path)).good
    kinds = ["picture" if isinstance(part, Medium) else part.text for part in first.segments[0].parts]
    assert kinds == ["picture", " or ", "picture", "?\nA. a\nB. ", "<image 2>", f" b{LETTER}"]
    assert second.marking.choices == () and second.marking.answers == ("12", "twelve")
    assert [isinstance(part, Medium) for part in second.segments[0].parts] == [True, False, True, False]


def test_a_lesson_without_a_picture(tmp_path: Path) -> None:
    second = good(scienceqa(tmp_path)).good[1]
    assert second.sources == () and prompt_of(second).startswith("Which is solid?")


def test_a_directory_by_its_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mme(tmp_path), mme_nested(tmp_path / "more")
    monkeypatch.chdir(tmp_path)
    for path in ("release", "release/color", "more/release"):
        assert len(good(Path(path)).good) == 2


def test_tasks_of_both_forms_stand_side_by_side(tmp_path: Path) -> None:
    """As in the directory that MME publishes: five tasks have folders of pictures and questions, nine have none."""
    mme(tmp_path), mme_nested(tmp_path)
    assert [x.kind for x in good(tmp_path / "release").good] == ["artwork", "artwork", "color", "color"]


def test_questions_of_a_test_split_can_be_answered(tmp_path: Path) -> None:
    [row] = json.loads(docvqa(tmp_path).read_text())["data"]
    answered, asked = (recognise_question(x).read_question(x) for x in (row, {**row, "answers": None}))
    assert answered.segments == asked.segments and len(asked.segments) == 1
    assert (answered.notes, asked.notes) == ((ANSWERED,), ())


def test_a_table_of_a_test_split_has_null_for_answers() -> None:
    row = {"question": "What?", "question_id": 1, "image_id": 2, "image": "a.jpg", "answers": None}
    row |= {"question_type": None, "answer_type": None, "multiple_choice_answer": None}
    assert len(recognise_question(row).read_question(row).segments) == 1
    with pytest.raises(RecordError, match="has no answer, as in the test split of VQAv2"):
        recognise_question(row).read(row)


def test_questions_about_a_picture_count_as_one(tmp_path: Path) -> None:
    for form in (mme, mme_parquet, mme_tsv, mme_paths, mme_unnamed):
        first, second = good(form(tmp_path)).good
        assert first.marking.group == second.marking.group and first.marking.group.startswith("color/")
        assert ("0001" in first.marking.group) == (form is not mme_unnamed)


@pytest.mark.parametrize(
    ("row", "key", "other"),
    [
        ({"text": "Is it?", "label": "no", "image": "a.jpg"}, "image", "b.jpg"),
        ({"question": "Is it?", "answer": "no", "image_source": "a", "image": "x.jpg"}, "image_source", "b"),
        (
            {"question": "Is it?", "answer": "no", "category": "random", "image": Embedded("inside:a#1/image", b"a")},
            "image",
            Embedded("inside:a#2/image", b"b"),
        ),
        ({"question": "Is it?", "answer": "no", "imageId": "1"}, "imageId", "2"),
        ({"question": "Is it?", "answers": ["no"], "image_id": "1", "image_classes": []}, "image_id", "2"),
        ({"question": "Is it?", "answers": ["no"], "questionId": 1, "docId": 1, "image": "a.png"}, "docId", 2),
        ({"query": "Is it?", "label": "no", "imgname": "1.png"}, "imgname", "2.png"),
    ],
)
def test_questions_about_a_picture_are_drawn_together(row: dict[str, Any], key: str, other: Any) -> None:
    """They depend on each other, so that intervals count them as one; those about another picture are apart."""
    rows = [row, {**row, "question_id": "7"}, {**row, key: other}]
    if isinstance(value := row[key], Embedded):  # a table holds it twice
        rows[1][key] = Embedded("inside:a#3/image", value.data)
    groups = [recognise(x).read(x).marking.group for x in rows]
    assert groups[0] == groups[1] != groups[2] and all(groups)


def test_other_questions_of_yes_and_no_are_not_those_of_mme(tmp_path: Path) -> None:
    [row] = [{**x, "question": "Is it red?"} for x in mme_rows(base64_of("red"))[:1]]
    assert good(mme_tsv(tmp_path)).good[0].format == "MME"
    with pytest.raises(DataError, match='has neither "prompt" nor "text"'):
        good(save_tab(tmp_path / "other.tsv", [row]))


# -- what cannot be used -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test2015", pytest.param("test-dev2015", marks=pytest.mark.matrix)])
def test_a_test_split_is_answered_and_not_marked(tmp_path: Path, vlm: Any, monkeypatch: Any, split: str) -> None:
    """The page's program turns the answers into the file that VQAv2's server takes."""
    asked = [{"image_id": 42, "question": "What is this?", "question_id": 42000 + i} for i in range(2)]
    save(tmp_path / "COCO_test2015_000000000042.jpg", picture())
    name = f"v2_OpenEnded_mscoco_{split}_questions.json"
    questions = save(tmp_path / name, {"data_subtype": split, "questions": asked})
    with pytest.raises(DataError, match="has no answer, as in the test split of VQAv2"):
        good(questions)
    assert vlm("batch", questions, "-o", tmp_path / "answers.jsonl", "-n", 4).exit_code == 0
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs/evaluation.md").read_text().partition("### Splits without answers")[2]
    exec(blocks(section, "python")[0], {})
    results = json.loads((tmp_path / "results.json").read_text())
    assert [x["question_id"] for x in results] == [42000, 42001] and all(isinstance(x["answer"], str) for x in results)


def test_questions_without_answers(tmp_path: Path) -> None:
    questions = vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    says = r"holds questions alone, and the answers of test splits are not published\. Put 'v2_mscoco_val2014_annot"
    with pytest.raises(DataError, match=says):
        good(questions)
    says = "Put the file of annotations of the same split beside it, both with their published names"
    with pytest.raises(DataError, match=says):
        good(questions.rename(tmp_path / "renamed.json"))


def test_answers_of_another_split(tmp_path: Path) -> None:
    questions, answers = vqav2(tmp_path), tmp_path / "v2_mscoco_val2014_annotations.json"
    answers.write_text(answers.read_text().replace("42000", "43000"))
    with pytest.raises(DataError, match="has the question 42000, and its answers are not in 'v2_mscoco_val2014_annot"):
        good(questions)


@pytest.mark.parametrize(
    ("form", "old", "new", "says"),
    [
        (
            docvqa,
            '"answers"',
            '"others"',
            "has no answer, as in the test split of DocVQA, whose answers are not published",
        ),
        (textvqa, '"answers"', '"others"', "has no answer, as in the test split of TextVQA"),
        (gqa, '"answer": "no"', '"x": "no"', "has no answer, as in the test split of GQA"),
        (mmbench, "\tB\tidentity", "\t\tidentity", "has no answer, as in the test split of MMBench"),
        (scienceqa, '"answer": 1', '"answer": 2', '"answer" is 2, and there are 2 choices, from 0'),
        (mmbench, "\tdog\t", "\t\t", "has the choices A, and they must be two or more: A, B, C and so on"),
        (mmbench, "\t241\tdev", "\t999\tdev", '"image" names the row with the index 999, which holds no picture'),
        (mmstar_tsv, "Options: A", "Pick: A", '"question" must end with its options'),
        (vqav2, '"question": "What', '"query": "What', 'has neither "prompt" nor "text"'),
    ],
)
def test_rows_that_cannot_be_used(form: Form, old: str, new: str, says: str, tmp_path: Path) -> None:
    path = form(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(DataError, match=says):
        good(path)


def test_a_table_that_is_cut_short(tmp_path: Path) -> None:
    path = mmstar_tsv(tmp_path)
    text = path.read_text()
    path.write_text(text.replace(base64_of("red"), base64_of("red")[:-7]))
    with pytest.raises(DataError, match='"image" is no whole base64'):
        good(path)


HOSTILE = [None, True, -1, 1e308, "", "[", [], {}, [[]], {"answer": [1]}, {"bytes": None, "path": None}]


def damaged(value: Any) -> Iterator[Any]:
    """Copies of a document in each of which one value, at any depth, is another one or gone."""
    yield from HOSTILE
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield {x: y for x, y in value.items() if x != key} if isinstance(value, dict) else value[:key]
        for other in damaged(value[key]):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = other
            yield copy


def slow(*forms: Form) -> list[Any]:
    return [pytest.param(form, marks=pytest.mark.matrix) for form in forms]


@pytest.mark.parametrize("form", [gqa, coco, *slow(vqav2, textvqa, scienceqa, docvqa, chartqa)])
def test_a_damaged_document_is_told(form: Form, tmp_path: Path) -> None:
    form(tmp_path)
    told = 0
    for path in sorted(tmp_path.glob("*.json")):
        text = path.read_text()
        for document in damaged(json.loads(text)):
            path.write_text(json.dumps(document))
            try:
                good(path)
            except DataError:
                told += 1
        path.write_text(text)
    assert told > 20


@pytest.mark.parametrize("form", [mmstar_tsv, *slow(mme_tsv, mmbench)])
def test_a_damaged_table_is_told(form: Form, tmp_path: Path) -> None:
    path = form(tmp_path)
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        for piece in (b"", b"\t", b"\n", b'"', b"\x00", b"\xff"):
            path.write_bytes(whole[:place] + piece + whole[place + 1 :])
            try:
                good(path)
            except DataError:
                told += 1
    assert told > 20


def test_one_record_that_begins_like_a_document(tmp_path: Path) -> None:
    row = {"info": 1, "prompt": "Two and two?", "completion": " four"}
    for count in (1, 2):
        path = save(tmp_path / "rows.jsonl", (json.dumps(row) + "\n") * count)
        assert [x.format for x in good(path).good] == ["records of vlm"] * count


def test_the_page_lists_each_benchmark_with_its_metric() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {
        re.findall(r"\[(.+?)\]", first)[0]: metric.strip("`") for first, _, _, metric, _ in table(page, "benchmark")
    }
    assert rows == {x.name: x.metric for x in BENCHMARKS}
    assert [name.strip("`") for name, *_ in table(page, "`--metric`")] == list(METRICS)
