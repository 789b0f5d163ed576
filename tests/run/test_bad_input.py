"""What a user can get wrong: one clear message that names it and the mend, the right exit status, nothing harmed."""

from pathlib import Path

import pytest
import yaml

from maect_jax import config as settings
from maect_jax import config_checks, run
from maect_jax.errors import ConfigError
from runs import TINY, make_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def status_and_message(capsys, tmp_path, monkeypatch):
    """Runs the command line in this process; devices must not be touched before the config is known to be good."""

    def call(*arguments: str, config: str = TINY, workdir: Path | None = None, devices_allowed: bool = False):
        if not devices_allowed:
            monkeypatch.setattr("jax.devices", lambda *_: pytest.fail("a device was touched"))
            monkeypatch.setattr("jax.device_count", lambda *_: pytest.fail("a device was touched"))
        status = run.main([f"--config={config}", f"--workdir={workdir or tmp_path / 'run'}", *arguments])
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--config.tune.top_kk=3"], 2, ["config.tune.top_kk", "did you mean config.tune.top_k?"]),
        (["--config.epochs=3"], 2, ["config.epochs", "did you mean"]),
        (["--config.pretrain.batch=many"], 2, ["config.pretrain.batch", "'many'", "int"]),
        (["--config.model.remat=3"], 2, ["config.model.remat", "bool"]),
        (["--config.head.queue=40"], 2, ["config.head.queue = 40", "head.batch = 16", "for instance 32"]),
        (["--config.tune.frozen_blocks=3"], 2, ["config.tune.frozen_blocks = 3", "2 blocks"]),
        (["--config.tune.frozen_blocks=2"], 2, ["config.tune.frozen_blocks = 2", "2 blocks"]),
        (["--config.tune.top_k=33"], 2, ["config.tune.top_k = 33", "32 rows"]),
        (["--config.model.image_size=18"], 2, ["config.model.image_size = 18", "multiple of model.patch = 4"]),
        (["--config.stages=head,pretrain"], 2, ["config.stages", "in the order"]),
        (["--config.stages=pretrian"], 2, ["config.stages", "did you mean 'pretrain'?"]),
        (["--config.pretrain.mask_ratio=1.0"], 2, ["config.pretrain.mask_ratio = 1.0"]),
        (["--config.model.channels=1", "--config.tune.augmentation=strong"], 2, ["needs 3 channels", "data.mean"]),
        (["--config.stages=tune"], 2, ["'tune'", "'head'", "--config.init_from"]),
        (["--config.init_from=/nowhere/run", "--config.stages=head"], 2, ["config.init_from", "/nowhere/run"]),
        (["--config.stages=pretrain,tune"], 2, ["'tune'", "'head'", "--config.init_from"]),
        (["--config.tune.crop_scale=0.3,one"], 2, ["config.tune.crop_scale", "'0.3,one'", "tuple"]),
        (["--config.tune.crop_scale=0.3,0.2"], 2, ["config.tune.crop_scale = (0.3, 0.2)"]),
        (["--config.data.mean=a,b,c"], 2, ["config.data.mean", "'a,b,c'"]),
        (["--config.model.decoder.heads=0"], 2, ["config.model.decoder.heads = 0", "at least 1"]),
        (["--config.model.projector.hidden=0"], 2, ["config.model.projector.hidden = 0"]),
        (["--config.pretrain.base_lr=nan"], 2, ["config.pretrain.base_lr = nan", "finite"]),
        (["--config.data.workers=-1"], 2, ["config.data.workers = -1"]),
        (["--config.evaluate.online_limit=5"], 2, ["config.evaluate.online_limit = 5"]),
        (["--config"], 2, ["--config", "expected one argument"]),
        (["--confg=x"], 2, ["'--confg=x' is not understood"]),
        (["--config.pretrain.batch=128"], 3, ["64 pictures", "config.pretrain.batch = 128", "at most 64"]),
        (["--config.data.train=/nowhere"], 3, ["data.train", "/nowhere"]),
        (["--config.data.train=imagent"], 3, ["data.train", "'imagent'", "did you mean 'imagenet"]),
    ],
)
def test_wrong_settings(status_and_message, pictures, arguments, status, words):
    data = [] if any("data.train" in a for a in arguments) else [f"--config.data.train={pictures}"]
    found, message = status_and_message(*data, *arguments)
    assert found == status, message
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_all_problems_are_reported_at_once(status_and_message, pictures):
    wrong = ["--config.head.queue=40", "--config.tune.frozen_blocks=9", "--config.model.pooling=max"]
    status, message = status_and_message(f"--config.data.train={pictures}", *wrong)
    assert status == 2
    assert all(key in message for key in ("head.queue", "tune.frozen_blocks", "model.pooling"))


@pytest.mark.parametrize("content", ["nothing", "one class", "a file that is no picture"])
def test_wrong_folders(status_and_message, tmp_path, content):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    words = {"nothing": "no pictures", "one class": "only one class", "a file that is no picture": "000.png"}
    if content != "nothing":
        folder = make_pictures(tmp_path / "made", classes=("a",) if content == "one class" else ("a", "b", "c", "d"))
    if content == "a file that is no picture":
        (folder / "train" / "b" / "000.png").write_bytes(b"this is no picture")
    status, message = status_and_message(f"--config.data.train={folder}", devices_allowed=True)
    assert status == 3, message
    assert words[content] in message and str(folder) in message


def test_a_batch_that_the_devices_do_not_divide(status_and_message, pictures):
    arguments = (f"--config.data.train={pictures}", "--config.pretrain.batch=12")
    status, message = status_and_message(*arguments, devices_allowed=True)  # the tests have 8 devices
    assert status == 2
    assert "config.pretrain.batch = 12" in message and "8 devices" in message and "instance" in message


def test_a_work_folder_of_another_run_is_left_alone(status_and_message, tmp_path, pictures):
    (tmp_path / "run" / "pretrain" / "checkpoints" / "2" / "meta").mkdir(parents=True)  # something to lose
    earlier = tmp_path / "run" / "config.resolved.yaml"
    config = settings.load(TINY, {"data.train": str(pictures), "model.width": "32"})
    settings.derive(config, 64)
    earlier.write_text(yaml.safe_dump(settings.plain(config)))
    before = earlier.read_text()
    status, message = status_and_message(f"--config.data.train={pictures}", workdir=tmp_path / "run")
    assert status == 2
    assert "config.model.width = 32, not 16" in message
    assert earlier.read_text() == before and len(list((tmp_path / "run").iterdir())) == 2


def test_a_recipe_that_is_not_there(status_and_message):
    status, message = status_and_message(config="configs/digit.py")
    assert status == 2 and "did you mean 'configs/digits.py'?" in message
    status, message = status_and_message(config="configs/mae_ct_vitl.py:augg")
    assert status == 2 and "no variant 'augg'" in message and "aug" in message


@pytest.mark.parametrize("text", ["def get_config(variant):\n    return 1 / 0\n", "def get_config(:\n", "x = 1\n"])
def test_a_recipe_that_fails(tmp_path, status_and_message, text):
    recipe = tmp_path / "mine.py"
    recipe.write_text(text)
    status, message = status_and_message(config=str(recipe))
    assert status == 2 and "mine.py" in message and "Error" in message


def test_a_work_folder_that_is_a_file(status_and_message, tmp_path, pictures):
    (tmp_path / "file").write_text("mine")
    status, message = status_and_message(f"--config.data.train={pictures}", workdir=tmp_path / "file")
    assert status == 2 and "is a file" in message and (tmp_path / "file").read_text() == "mine"


def test_a_recipe_with_a_misspelt_setting(tmp_path, status_and_message):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from maect_jax.config import default\n"
        "def get_config(variant):\n    c = default()\n    c.tune.temprature = 0.1\n    return c\n"
    )
    status, message = status_and_message(config=str(recipe))
    assert status == 2 and "config.tune.temprature" in message and "config.tune.temperature" in message


def test_none_of_the_checks_passes_a_setting_out_of_range():
    good = settings.load(TINY, {"data.train": "digits"})
    assert config_checks.check(good) == []
    for key, value in {
        "tune.temperature": 0.0,
        "head.warmup": 1.5,
        "pretrain.base_lr": -1e-3,
        "tune.crop_scale": (0.5, 0.2),
        "pretrain.accumulate": 3,
        "evaluate.batch": 0,
        "pretrain.epochs": 0,
        "model.dtype": "float16",
        "data.std": (0.2, 0.0, 0.2),
        "log_every": 0,
    }.items():
        config = settings.load(TINY, {"data.train": "digits"})
        section = config
        for part in key.split(".")[:-1]:
            section = section[part]
        section[key.split(".")[-1]] = value
        problems = config_checks.check(config)
        assert problems and key.split(".")[-1] in problems[0], key


def test_config_error_lists_every_problem():
    assert str(ConfigError(["a", "b"])) == "a\nb"
    assert ConfigError("a").problems == ["a"] and ConfigError("a").status == 2
