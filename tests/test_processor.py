"""Prompts and images to tensors: which placeholder is which medium, and what stays text."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoProcessor, PreTrainedTokenizerFast

from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import LanguageModelError, PromptError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text, interleave
from vlm_cli.tokenizer import add_tokens

PREPROCESS = {
    "size": 32,
    "mode": "RGB",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def bytes_tokenizer(**special):
    """Every byte is a token; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = list(dict.fromkeys(special.values()))
    vocabulary = {token: i for i, token in enumerate([*alphabet, *names])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def processor():
    tokenizer = bytes_tokenizer(eos_token="</s>")
    add_tokens(tokenizer, [END_OF_CHUNK, MEDIA_TOKEN], len(tokenizer))
    return VLMProcessor(OpenCLIPImageProcessor(PREPROCESS), tokenizer)


def plain(colour):
    return Image.new("RGB", (40, 50), colour)


RED, GREEN, BLUE = map(plain, ("red", "green", "blue"))


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"resize_mode": "squash"}, {"resize_mode": "longest"}, {"size": (24, 32)}])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_those_of_openclip(change, mode):
    preprocess = PREPROCESS | change
    theirs = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    image = Image.effect_noise((61, 47), 90).convert(mode)
    ours = OpenCLIPImageProcessor(preprocess)([[[image]]])["pixel_values"]
    assert torch.equal(ours[0, 0, 0], theirs(image))


def test_padding_of_media_and_frames_is_marked():
    found = OpenCLIPImageProcessor(PREPROCESS)([[[RED, GREEN], [BLUE]], [], [[RED]]])
    assert found["pixel_values"].shape == (3, 2, 2, 3, 32, 32)
    assert found["vision_mask"].tolist() == [
        [[True, True], [True, False]],
        [[False, False], [False, False]],
        [[True, False], [False, False]],
    ]
    assert not found["pixel_values"][~found["vision_mask"]].any()
    assert found["pixel_values"][found["vision_mask"]].flatten(1).any(1).all()


# -- texts -------------------------------------------------------------------------------------------------------------


def test_each_placeholder_is_one_media_token(processor):
    batch = processor(text="a<image>bc<image>", images=[RED, GREEN])
    media = processor.media_token_id
    assert (batch["input_ids"][0] == media).tolist() == [False, True, False, False, True]
    assert batch["attention_mask"].tolist() == [[1] * 5]
    assert batch["pixel_values"].shape == (1, 2, 1, 3, 32, 32)
    alone = processor(text="<image>", images=GREEN)["pixel_values"]
    assert torch.equal(batch["pixel_values"][0, 1], alone[0, 0])


def test_rows_are_padded_at_the_left(processor):
    batch = processor(text=["abc", "a"])
    pad = processor.tokenizer.pad_token_id
    assert batch["input_ids"][1, :2].tolist() == [pad, pad]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "text", [r"\<image>", r"a\<image>b", r"\<image>\<image>", "<images>", "<image >", "<imag", "<IMAGE>"]
)
@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_text_that_looks_like_a_placeholder_is_text(processor, text, parse_special_tokens):
    ids = processor(text=text, parse_special_tokens=parse_special_tokens)["input_ids"][0].tolist()
    assert processor.media_token_id not in ids
    assert processor.decode(ids) == text.replace("\\", "")


def test_a_literal_placeholder_beside_a_real_one(processor):
    ids = processor(text=r"\<image><image>\<image>", images=[RED])["input_ids"][0].tolist()
    literal = processor(text=r"\<image>")["input_ids"][0].tolist()
    assert ids == [*literal, processor.media_token_id, *literal]


@pytest.mark.parametrize("spelling", [END_OF_CHUNK, "</s>", "<pad>"])
def test_text_that_spells_a_special_token_is_text_unless_asked(processor, spelling):
    ids = processor(text=f"a{spelling}")["input_ids"][0].tolist()
    assert len(ids) == 1 + len(spelling) and processor.decode(ids) == f"a{spelling}"
    token = processor.tokenizer.convert_tokens_to_ids(spelling)
    assert processor(text=f"a{spelling}", parse_special_tokens=True)["input_ids"][0].tolist()[1:] == [token]


def test_bytes_that_are_no_text(processor):
    with pytest.raises(PromptError, match="not UTF-8 text"):
        processor(text="h\udcff")


def test_the_tokens_of_a_beginning_are_kept():
    """`<s>` stands once, in front, whatever the prompt is made of."""
    tokenizer = bytes_tokenizer(bos_token="<s>", eos_token="</s>")
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    add_tokens(tokenizer, [MEDIA_TOKEN], len(tokenizer))
    processor = VLMProcessor(OpenCLIPImageProcessor(PREPROCESS), tokenizer)
    ids = processor(text=r"<image>a\<image>", images=[RED])["input_ids"][0].tolist()
    assert ids[:2] == [tokenizer.bos_token_id, processor.media_token_id]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_parts_of_a_prompt(processor):
    parts = interleave("a <image> b", ["x.png"]).parts
    assert parts == [Text("a "), Medium("x.png"), Text(" b")]
    ours = processor(text=[parts], images=[[RED]])
    theirs = processor(text="a <image> b", images=[RED])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])


# -- images and texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image>", RED),
        ("<image>", [RED]),
        ("<image>", [[RED]]),
        (["<image>"], [[RED]]),
        ("<image><image>", [RED, GREEN]),
        (["<image>", "a"], [[RED], []]),
        (["<image>", "a"], [RED]),
        (["a", "<image><image>", "<image>"], [RED, GREEN, BLUE]),
        (["a", "<image><image>", "<image>"], [[], [RED, GREEN], [BLUE]]),
        ("<image>", [[RED, GREEN]]),  # one medium of two frames
        ("a", None),
        ("a", []),
    ],
)
def test_forms_of_images_that_fit(processor, text, images):
    batch = processor(text=text, images=images)
    media = (batch["input_ids"] == processor.media_token_id).sum(-1)
    there = batch["vision_mask"].any(-1).sum(-1) if "vision_mask" in batch else torch.zeros_like(media)
    assert torch.equal(media, there)


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image>", None),
        ("<image>", []),
        ("a", RED),
        ("<image>", [RED, GREEN]),
        ("<image><image>", [RED]),
        (["<image>", "a"], [[], [RED]]),
        (["<image>", "<image>"], [RED]),
        (["<image>", "a"], [RED, GREEN]),
        (["a", "b"], [[RED], []]),
    ],
)
def test_forms_of_images_that_do_not_fit(processor, text, images):
    with pytest.raises(PromptError, match="placeholders, but"):
        processor(text=text, images=images)


def test_rows_are_padded_at_the_right_where_a_program_wants_that(processor):
    left, right = (processor(text=["abc", "a<image>"], images=[[], [RED]], padding_side=x) for x in ("left", "right"))
    assert right["input_ids"].tolist()[1] == [*left["input_ids"].tolist()[1][1:], processor.tokenizer.pad_token_id]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] != left["attention_mask"].tolist()


def test_a_text_that_has_its_special_tokens_gets_no_other(processor):
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", processor.tokenizer.eos_token_id)]
    )
    ids = [processor(text="a</s>", add_special_tokens=x)["input_ids"][0].tolist() for x in (True, False)]
    end = processor.tokenizer.eos_token_id
    assert ids[1] == [ids[0][1], end] and ids[0][0] == end and ids[0].count(end) == 1 and len(ids[0]) == 6


def test_a_row_is_never_cut(processor):
    assert processor(text="abcd", truncation=True, max_length=4)["input_ids"].shape == (1, 4)
    assert processor(text="abcd", max_length=3)["input_ids"].shape == (1, 4)
    with pytest.raises(PromptError, match="a row has 4 tokens, and max_length is 3"):
        processor(text="abcd", truncation=True, max_length=3)
    messages = [{"role": "user", "content": "abcd"}]
    options = {"tokenize": True, "processor_kwargs": {"truncation": True, "max_length": 3}}
    with pytest.raises(PromptError, match="Give a larger max_length, or None"):
        processor.apply_chat_template(messages, **options)


def test_clips_come_beside_images_or_among_them(processor):
    among = processor(text="<video>a<image><video>", images=[[RED, GREEN], BLUE, [GREEN, RED]])
    beside = processor(text="<video>a<image><video>", images=[BLUE], videos=[[RED, GREEN], [GREEN, RED]])
    swapped = processor(text="<video>a<image><video>", images=[BLUE], videos=[[GREEN, RED], [RED, GREEN]])
    assert all(torch.equal(among[key], beside[key]) for key in among)
    assert not torch.equal(swapped["pixel_values"], beside["pixel_values"])
    rows = processor(text=["<video>a", "<image>"], images=[[], [BLUE]], videos=[[[RED, GREEN]], []])
    assert rows["vision_mask"].tolist() == [[[True, True]], [[True, False]]]
    with pytest.raises(PromptError, match=r"\[1\] <video> placeholders, but \[0\] videos"):
        processor(text="<video>", videos=[])


def test_a_processor_opens_no_file(processor):
    with pytest.raises(PromptError, match=r"a processor opens no file.*pass the image in `images`"):
        processor(text="<image:cat.png>")
    with pytest.raises(PromptError, match=r"<video:cat\.mp4> names a file.*pass the video in `videos`"):
        processor(text="<video:cat.mp4>")


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_added_tokens_come_in_their_order_and_then_a_pad_token():
    tokenizer = bytes_tokenizer(eos_token="</s>")
    size = len(tokenizer)
    assert add_tokens(tokenizer, [END_OF_CHUNK, MEDIA_TOKEN], size) == ([END_OF_CHUNK, MEDIA_TOKEN, "<pad>"], size)
    assert tokenizer.padding_side == "left" and tokenizer.eos_token == "</s>"
    with_pad = bytes_tokenizer(eos_token="</s>", pad_token="</s>")
    assert add_tokens(with_pad, [MEDIA_TOKEN], size) == ([MEDIA_TOKEN], size)


def test_tokens_without_a_row_get_one_of_ours():
    tokenizer = bytes_tokenizer(eos_token="</s>")
    size = len(tokenizer)
    assert add_tokens(tokenizer, [MEDIA_TOKEN], size - 1) == (["</s>", MEDIA_TOKEN, "<pad>"], size - 1)
    # …and rows without a token give way.
    assert add_tokens(bytes_tokenizer(eos_token="</s>"), [MEDIA_TOKEN], size + 9) == ([MEDIA_TOKEN, "<pad>"], size)


def test_a_special_media_token_cannot_be_told_from_text():
    tokenizer = bytes_tokenizer(eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": [MEDIA_TOKEN]})
    with pytest.raises(LanguageModelError, match="special token '<image>' of its own"):
        add_tokens(tokenizer, [MEDIA_TOKEN], len(tokenizer))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_processor_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    text = r"a<image>\<image></s>日本"
    wanted = processor(text=text, images=[RED])
    for loaded in (VLMProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, VLMProcessor)
        found = loaded(text=text, images=[RED])
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert loaded.tokenizer.padding_side == "left"


def test_json_of_a_processor_is_plain(processor):
    processor.image_processor.transform(RED)  # a cached transform is not data
    assert json.loads(processor.image_processor.to_json_string())["preprocess"]["size"] == 32


@pytest.mark.parametrize(
    ("template", "start"),
    [("<s> $A </s>", ["<s>"]), ("$A </s>", []), ("<s> $A", ["<s>"]), ("<s> <s> $A </s> </s>", ["<s>", "<s>"])],
)
def test_a_prompt_has_no_token_that_ends_it(processor, template, start):
    """Some tokenizers end each text with their end token; an answer would begin after the end."""
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    plain = tokenizer("aa").input_ids
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    begin = tokenizer.convert_tokens_to_ids(start)
    assert processor.encode([Text("aa")]) == [*begin, *plain]
    assert processor(text="aa")["input_ids"].tolist() == [[*begin, *plain]]
    assert processor.encode([]) == begin
    whole = tokenizer("aa").input_ids
    assert (whole == [*begin, *plain]) == ("</s>" not in template)  # the twin
