"""The exported encoder as a backbone of transformers' detectors and segmenters: maps of four resolutions.

A plain ViT has one resolution. ViTDet's simple feature pyramid (Li et al. 2022) makes four of it: each of p2 to p5, of
strides 4, 8, 16 and 32 where patches have 16 pixels, is rescaled from the output of one block.

Exact: the encoder with its class token and all of its weights; the norm after the last block is not used. For pictures
of another size the position table is resized (bicubic). New and random: the transposed convolutions of p2 and p3.
"""

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, ViTConfig, ViTModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.models.vit.modeling_vit import ViTPreTrainedModel
from transformers.models.vitdet.modeling_vitdet import VitDetLayerNorm


class ViTPyramidConfig(BackboneConfigMixin, ViTConfig):
    model_type = "vit_pyramid"
    depths: list[float] | tuple[float, ...] = (1, 1, 1, 1)  # where p2 … p5 leave the encoder; 1 = after the last block

    def __post_init__(self, **kwargs):
        self.stage_names = ["p2", "p3", "p4", "p5"]
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)


class ViTPyramid(BackboneMixin, ViTPreTrainedModel):
    config: ViTPyramidConfig

    def __init__(self, config: ViTPyramidConfig):
        super().__init__(config)
        d = config.hidden_size
        self.num_features = [d // 4, d // 2, d, d]
        self.vit = ViTModel(config, add_pooling_layer=False)
        first, second = nn.ConvTranspose2d(d, d // 2, 2, 2), nn.ConvTranspose2d(d // 2, d // 4, 2, 2)
        scales = {"p2": nn.Sequential(first, VitDetLayerNorm(d // 2), nn.GELU(), second)}
        scales |= {"p3": nn.ConvTranspose2d(d, d // 2, 2, 2), "p4": nn.Identity(), "p5": nn.MaxPool2d(2)}
        self.scales = nn.ModuleDict({name: scales[name] for name in config.out_features})
        self.post_init()

    def load_encoder(self, folder: str) -> None:
        """Puts in the weights of a folder that `convert --to hf-vit` wrote: all of them, or an error."""
        encoder, report = ViTModel.from_pretrained(folder, output_loading_info=True)
        if missing := [name for name in report["missing_keys"] if not name.startswith("pooler.")]:
            raise ValueError(f"{folder} is no folder of `convert --to hf-vit`: {missing[0]} is missing")
        encoder.pooler = None
        self.vit.load_state_dict(encoder.state_dict())

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        states = self.vit(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        blocks = [round(depth * self.config.num_hidden_layers) for depth in self.config.depths]
        maps = {name: states[i][:, 1:].mT.unflatten(2, grid) for name, i in zip(self.stage_names, blocks)}
        return BackboneOutput(feature_maps=tuple(scale(maps[name]) for name, scale in self.scales.items()))


AutoConfig.register("vit_pyramid", ViTPyramidConfig)
AutoBackbone.register(ViTPyramidConfig, ViTPyramid)
