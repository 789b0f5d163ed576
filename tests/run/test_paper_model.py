"""A paper recipe runs through its training stages on this machine, with a small batch and two updates a stage."""

import json

from runs import launch, lines, make_pictures


def test_vit_base_recipe_with_a_batch_of_eight(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", size=64, train=4, test=1)
    small = [f"--config.{stage}.{key}" for stage in ("pretrain", "head", "tune") for key in ("batch=8", "epochs=1")]
    arguments = (f"--config.data.train={pictures}", *small, "--config.pretrain.warmup_epochs=0")
    quick = ("--config.data.workers=0", "--config.stages=pretrain,head,tune", "--config.log_every=1")
    done = launch(tmp_path / "run", *arguments, *quick, config="configs/mae_ct_vitb.py")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "tune" / "DONE.json").read_text())["step"] == 2
    losses = [(line["stage"], line["step"], line["loss"]) for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert [loss[:2] for loss in losses] == [(s, u) for s in ("pretrain", "head", "tune") for u in (1, 2)]
    assert all(0 < loss < 20 for *_, loss in losses)
