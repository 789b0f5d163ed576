"""A run that diverges stops with what it saw and where, and keeps its last good checkpoint."""

import json

from maect_jax import run
from runs import TINY, make_pictures


def test_three_bad_batches_in_a_row_end_the_run(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "pictures")
    workdir = tmp_path / "run"
    arguments = [f"--config={TINY}", f"--workdir={workdir}", f"--config.data.train={pictures}"]
    status = run.main([*arguments, "--config.pretrain.base_lr=1e30"])
    message = capsys.readouterr().err
    assert status == 5
    assert "pretrain: loss or gradient was not finite in 3 batches in a row" in message and "epoch" in message
    dump = json.loads((workdir / "pretrain" / "nonfinite.json").read_text())
    steps = [batch["step"] for batch in dump["batches"]]
    assert steps == list(range(steps[0], steps[0] + 3))
    assert all(len(set(batch["ids"])) == 16 for batch in dump["batches"])
    assert not (workdir / "pretrain" / "DONE.json").exists()
    assert any((workdir / "pretrain" / "checkpoints").glob("[0-9]*/meta"))
