"""Checkpoints that timm and transformers write become models that compute what the libraries compute."""

import pytest
from needed import needed

from maect_jax.exchange.export.proof import TOLERANCE, difference, ours, pictures
from maect_jax.exchange.files import open_model
from torch_files import torch

timm, transformers = needed("timm"), needed("transformers")
safetensors_torch = needed("safetensors.torch")

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4)
HF_SMALL = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8
)
HF_DECODER = dict(
    decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=128
)


def randomised(module):
    """Every parameter random, norms and biases and tables too: nothing is right by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:  # fixed position tables stay
                scale = 0.3 if parameter.ndim < 2 else 0.7 / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return module.eval()


def compare(model, theirs: dict) -> None:
    """`theirs` are outputs for `proof.pictures(model)`; each must be ours."""
    mine = ours(model, *pictures(model))
    assert theirs.keys() <= mine.keys()
    for name, found in theirs.items():
        assert found.shape == mine[name].shape
        assert difference(mine[name], found.numpy()) <= TOLERANCE, name


@pytest.mark.parametrize(
    ("entry", "arguments", "kind"),
    [
        ("vit_tiny_patch16_224", dict(SMALL, num_classes=0), "pth"),
        ("vit_tiny_patch16_224", dict(SMALL, num_classes=0), "safetensors"),
        ("vit_tiny_patch16_224", dict(SMALL, num_classes=5), "pth"),
        ("vit_tiny_patch16_224", dict(SMALL, num_classes=5, global_pool="avg"), "safetensors"),
        ("vit_base_patch16_224", dict(num_classes=0), "pth"),
    ],
)
def test_a_vit_of_timm(entry, arguments, kind, tmp_path):
    module, path = randomised(timm.create_model(entry, **arguments)), tmp_path / "weights"
    if kind == "pth":
        torch.save(module.state_dict(), path)
    else:
        safetensors_torch.save_file(module.state_dict(), path)
    model = open_model(path, heads=arguments.get("num_heads")).model
    assert model.encoder.learned_positions and model.pooling == ("mean" if "global_pool" in arguments else "cls")
    images = torch.tensor(pictures(model)[0])
    with torch.no_grad():
        tokens = module.forward_features(images)
        vector = module.forward_head(tokens, pre_logits=True)
        logits = {"logits": module(images)} if arguments["num_classes"] else {}
    compare(model, {"tokens": tokens, "features": vector} | logits)


@pytest.mark.parametrize("layout", ["hf4", "hf5"])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_vit_of_transformers(kind, layout, tmp_path):
    settings = transformers.ViTConfig(**HF_SMALL, layer_norm_eps=1e-6, num_labels=5)
    module = randomised(getattr(transformers, kind)(settings))
    if layout == "hf4":  # what save_pretrained writes, in every version
        module.save_pretrained(tmp_path)
        opened = open_model(tmp_path)
    else:  # names of the modules of version 5
        torch.save(module.state_dict(), tmp_path / "weights.bin")
        opened = open_model(tmp_path / "weights.bin", heads=4)
    assert opened.layout == f"{layout}_{'model' if kind == 'ViTModel' else 'classifier'}"
    images = torch.tensor(pictures(opened.model)[0])
    with torch.no_grad():
        if kind == "ViTModel":
            theirs = {"tokens": module(images).last_hidden_state}
        else:
            theirs = {"tokens": module.vit(images).last_hidden_state, "logits": module(images).logits}
    compare(opened.model, theirs)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("layout", ["hf4", "hf5", "hf5_saved"])
def test_a_vitmae_of_transformers(layout, normalised, tmp_path):
    settings = transformers.ViTMAEConfig(
        **HF_SMALL, **HF_DECODER, layer_norm_eps=1e-6, norm_pix_loss=normalised, mask_ratio=0.5
    )
    module = randomised(transformers.ViTMAEForPreTraining(settings))
    set_fixed_tables(module)
    if layout == "hf5":  # names of the modules
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
        settings.save_pretrained(tmp_path)
    else:
        module.save_pretrained(tmp_path)
    if layout == "hf4":  # version 5 writes other names for the decoder's blocks than the files on the hub have
        tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
        tensors = {name.replace("decoder_encoder.layer", "decoder_layers"): x for name, x in tensors.items()}
        safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    opened = open_model(tmp_path)
    assert opened.layout == f"{layout}_pretraining" and not opened.model.encoder.learned_positions
    model = opened.model
    assert (model.normalised_pixels, model.mask_ratio, model.decoder.heads) == (normalised, 0.5, 4)
    images, noise = map(torch.tensor, pictures(model))
    with torch.no_grad():
        found = module(images, noise=noise)
    compare(model, {"predictions": found.logits, "loss": found.loss})


def set_fixed_tables(module) -> None:
    """From scratch, transformers leaves them zero in recent versions; hub files have them."""
    from maect_jax.exchange.positions import fixed_table

    tables = ((module.vit.embeddings.position_embeddings, 48), (module.decoder.decoder_pos_embed, 32))
    for table, width in tables:
        table.data.copy_(torch.tensor(fixed_table(width, 4)))


def test_a_vitmae_with_zeroed_decoder_positions_is_refused(tmp_path):
    module = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HF_SMALL, **HF_DECODER))
    set_fixed_tables(module)
    module.decoder.decoder_pos_embed.data.zero_()
    module.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="decoder_pos_embed differs from the fixed sine-cosine table"):
        open_model(tmp_path)


def test_an_encoder_of_another_kind_is_refused_with_what_it_has_more(tmp_path):
    """Layer scale and register tokens, as DINOv2 has them, are not computed here."""
    module = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=0, init_values=1e-5, reg_tokens=2)
    torch.save(module.state_dict(), tmp_path / "x.pth")
    with pytest.raises(Exception, match=r"unexpected: blocks\.0\.ls1\.gamma"):
        open_model(tmp_path / "x.pth", heads=4)


def test_pictures_of_another_size_give_timms_tokens_with_positions_resized_as_by_torch(tmp_path):
    module = randomised(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=0))
    torch.save(module.state_dict(), tmp_path / "x.pth")
    model = open_model(tmp_path / "x.pth", heads=4, image_size=48).model
    larger = timm.create_model("vit_tiny_patch16_224", **SMALL | {"img_size": 48}, num_classes=0).eval()
    rows = module.pos_embed[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    rows = torch.nn.functional.interpolate(rows, size=(6, 6), mode="bicubic", align_corners=False)
    table = torch.cat([module.pos_embed[:, :1], rows.permute(0, 2, 3, 1).reshape(1, 36, 48)], dim=1)
    larger.load_state_dict(module.state_dict() | {"pos_embed": table})
    with torch.no_grad():
        tokens = larger.forward_features(torch.tensor(pictures(model)[0]))
    compare(model, {"tokens": tokens})
