"""The classes of Transformers that `vlm export --format hf` writes, in the order in which they are tried."""

from vlm_cli.checkpoint.export.hf.deepseek_vl import DeepSeekVLClass
from vlm_cli.checkpoint.export.hf.draft import HFClass
from vlm_cli.checkpoint.export.hf.gemma import Gemma3Class, PaliGemmaClass
from vlm_cli.checkpoint.export.hf.got_ocr2 import GotOCR2Class
from vlm_cli.checkpoint.export.hf.grid import AyaVisionClass, Cohere2VisionClass, InternVLClass, QianfanOCRClass
from vlm_cli.checkpoint.export.hf.idefics import IdeficsClass
from vlm_cli.checkpoint.export.hf.idefics3 import Idefics3Class, SmolVLMClass
from vlm_cli.checkpoint.export.hf.llava import LLaVAClass, ViPLLaVAClass
from vlm_cli.checkpoint.export.hf.llava_next import LLaVANeXTClass, LLaVANeXTVideoClass, LLaVAOneVisionClass
from vlm_cli.checkpoint.export.hf.ovis2 import Ovis2Class
from vlm_cli.checkpoint.export.hf.timm import FastVLMClass, PerceptionLMClass

__all__ = ["CLASSES"]

#: Transformers' word for the class -> the class.
CLASSES: dict[str, HFClass] = {
    "llava": LLaVAClass(),
    "vipllava": ViPLLaVAClass(),
    "llava_next": LLaVANeXTClass(),
    "llava_next_video": LLaVANeXTVideoClass(),
    "llava_onevision": LLaVAOneVisionClass(),
    "internvl": InternVLClass(),
    "smolvlm": SmolVLMClass(),
    "idefics3": Idefics3Class(),
    "paligemma": PaliGemmaClass(),
    "gemma3": Gemma3Class(),
    "cohere2_vision": Cohere2VisionClass(),
    "aya_vision": AyaVisionClass(),
    "qianfan_ocr": QianfanOCRClass(),
    "deepseek_vl": DeepSeekVLClass(),
    "got_ocr2": GotOCR2Class(),
    "perception_lm": PerceptionLMClass(),
    "fast_vlm": FastVLMClass(),
    "ovis2": Ovis2Class(),
    "idefics": IdeficsClass(),
}
