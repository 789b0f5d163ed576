"""The forms that `convert --to` writes, by name."""

from maect_jax.exchange.export.huggingface import HF_VIT, HF_VITMAE
from maect_jax.exchange.export.mae import MAE, MAECT
from maect_jax.exchange.export.onnx import ONNX
from maect_jax.exchange.export.target import Target
from maect_jax.exchange.export.timm import TIMM

TARGETS: dict[str, Target] = {target.name: target for target in (TIMM, HF_VIT, HF_VITMAE, MAE, MAECT, ONNX)}
