"""Layouts of published weights, in the order in which they are tried."""

from vlm_cli.checkpoint.published.layouts.aya_vision import HuggingFaceAyaVision
from vlm_cli.checkpoint.published.layouts.base import Layout
from vlm_cli.checkpoint.published.layouts.blip2 import HuggingFaceBLIP2, LavisBLIP2
from vlm_cli.checkpoint.published.layouts.cohere2_vision import HuggingFaceCohere2Vision
from vlm_cli.checkpoint.published.layouts.deepseek_vl import HuggingFaceDeepSeekVL
from vlm_cli.checkpoint.published.layouts.fast_vlm import HuggingFaceFastVLM
from vlm_cli.checkpoint.published.layouts.flamingo_mini import FlamingoMini
from vlm_cli.checkpoint.published.layouts.gemma import HuggingFaceGemma3, HuggingFacePaliGemma
from vlm_cli.checkpoint.published.layouts.got_ocr2 import HuggingFaceGotOCR2
from vlm_cli.checkpoint.published.layouts.idefics import HuggingFaceIDEFICS
from vlm_cli.checkpoint.published.layouts.idefics3 import HuggingFaceIdefics3, HuggingFaceSmolVLM
from vlm_cli.checkpoint.published.layouts.internvl import HuggingFaceInternVL
from vlm_cli.checkpoint.published.layouts.janus import HuggingFaceJanus
from vlm_cli.checkpoint.published.layouts.kosmos2 import Kosmos2
from vlm_cli.checkpoint.published.layouts.llava import HuggingFaceLLaVA
from vlm_cli.checkpoint.published.layouts.llava_next import (
    HuggingFaceLLaVANeXT,
    HuggingFaceLLaVANeXTVideo,
    HuggingFaceLLaVAOneVision,
)
from vlm_cli.checkpoint.published.layouts.llava_original import OriginalLLaVA
from vlm_cli.checkpoint.published.layouts.mllama import HuggingFaceMllama
from vlm_cli.checkpoint.published.layouts.nanovlm import NanoVLM
from vlm_cli.checkpoint.published.layouts.open_flamingo import OpenFlamingo
from vlm_cli.checkpoint.published.layouts.open_flamingo_v3 import OpenFlamingoV3
from vlm_cli.checkpoint.published.layouts.ovis2 import HuggingFaceOvis2
from vlm_cli.checkpoint.published.layouts.perception_lm import HuggingFacePerceptionLM
from vlm_cli.checkpoint.published.layouts.qianfan_ocr import HuggingFaceQianfanOCR
from vlm_cli.checkpoint.published.layouts.video_llava import HuggingFaceVideoLLaVA
from vlm_cli.checkpoint.published.layouts.vipllava import HuggingFaceViPLLaVA
from vlm_cli.checkpoint.published.layouts.xgen_mm import XGenMM

__all__ = ["LAYOUTS"]

LAYOUTS: tuple[Layout, ...] = (
    HuggingFaceLLaVA(),
    HuggingFaceViPLLaVA(),
    HuggingFaceVideoLLaVA(),
    HuggingFaceLLaVANeXT(),
    HuggingFaceLLaVANeXTVideo(),
    HuggingFaceLLaVAOneVision(),
    HuggingFaceGemma3(),
    HuggingFacePaliGemma(),
    HuggingFaceCohere2Vision(),
    HuggingFaceAyaVision(),
    HuggingFaceInternVL(),
    HuggingFaceQianfanOCR(),
    HuggingFaceGotOCR2(),
    Kosmos2(),
    HuggingFacePerceptionLM(),
    OriginalLLaVA(),
    HuggingFaceBLIP2(),
    HuggingFaceIDEFICS(),
    HuggingFaceIdefics3(),
    HuggingFaceSmolVLM(),
    HuggingFaceFastVLM(),
    HuggingFaceDeepSeekVL(),
    HuggingFaceJanus(),
    HuggingFaceMllama(),
    HuggingFaceOvis2(),
    LavisBLIP2(),
    FlamingoMini(),
    NanoVLM(),
    OpenFlamingo(),
    XGenMM(),
    OpenFlamingoV3(),
)
