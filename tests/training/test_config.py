import pytest

from sagan_fast.errors import InputError
from sagan_fast.models.config import preset_names
from sagan_fast.training.config import TrainConfig, read_yaml


@pytest.mark.parametrize("name", preset_names())
def test_a_config_survives_its_yaml_form(name, tmp_path):
    import yaml

    config = TrainConfig.from_preset(name, data="shapes", out=str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.from_dict(read_yaml(path)) == config


def test_what_both_networks_share_is_stated_once():
    config = TrainConfig.from_preset("shapes-32", out="x", num_classes=0, backend="sdpa")
    assert config.generator.num_classes == config.discriminator.num_classes == 0
    assert config.generator.backend == config.discriminator.backend == "sdpa"
    with pytest.raises(InputError, match="unknown key 'generator.num_classes': num_classes is stated once"):
        TrainConfig.from_preset("shapes-32", out="x", generator={"num_classes": 3})


def test_nested_overrides_keep_the_rest():
    config = TrainConfig.from_preset("shapes-32", out="x", generator={"base_channels": 4})
    assert config.generator.base_channels == 4 and config.generator.channel_multipliers == (8, 4, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "data must be given: the images"),
        ({"out": ""}, "out must be given: the folder of the run"),
        ({"stesp": 3}, "unknown key 'stesp': did you mean 'steps'?"),
        ({"generator": {"z_dm": 3}}, "unknown key 'generator.z_dm': did you mean 'z_dim'?"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"g_lr": True}, "g_lr must be a number, got True"),
        ({"generator": {"z_dim": 1.5}}, "generator.z_dim must be a whole number, got 1.5"),
        ({"g_lr": -1.0}, "g_lr must be positive, got -1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        ({"on_broken": "ignore"}, "on_broken must be one of fail, skip, got 'ignore'"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_preset("shapes-32", **{"out": "x", **change})


def test_numbers_mean_in_a_file_what_they_mean_on_the_command_line(tmp_path):
    from sagan_fast.commands.train import _parse

    base = ["--preset", "shapes-32", "--data", "shapes", "--out", str(tmp_path / "run")]
    for text in ("010", "12:30", "7", "0x10", "-3"):
        (tmp_path / "c.yaml").write_text(f"seed: {text}\ndata: shapes\nout: x\ng_lr: 1e-4\nflip: true\n")
        from_file, *_ = _parse(["--config", str(tmp_path / "c.yaml")])
        assert from_file.seed == _parse([*base, f"--seed={text}"])[0].seed, text
        assert from_file.g_lr == 1e-4 and from_file.flip is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 1\n", r"c\.yaml gives a twice: remove one of the lines"),
        ("generator: {z_dim: 1, z_dim: 2}\n", "gives z_dim twice"),
        ("num_classes: null\n", "gives num_classes no value: write one, or remove the line for the default"),
        ("generator:\n  z_dim:\n", "gives z_dim no value"),
    ],
)
def test_keys_that_stand_twice_or_empty(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(tmp_path / "c.yaml")


def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path):
    for text, message in (("- a\n- b\n", "must hold keys and values, got list"), ("a: [1", "is not valid YAML")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_yaml(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="cannot read .*none.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "processes", "parts", "norm_batch"),
    [
        ({}, 1, 1, 64),
        ({}, 4, 1, 16),
        ({"micro_batch_size": 8}, 1, 8, 8),
        ({"micro_batch_size": 8}, 4, 2, 8),
        ({"micro_batch_size": 8, "sync_batch_norm": True}, 4, 2, 32),
        ({"sync_batch_norm": True}, 4, 1, 64),
    ],
)
def test_a_batch_is_shared_by_processes_and_micro_batches(options, processes, parts, norm_batch):
    config = TrainConfig.from_preset("shapes-32", out="x", batch_size=64, **options)
    assert (config.micro_batches(processes), config.norm_batch(processes)) == (parts, norm_batch)


def test_a_batch_that_cannot_be_shared_is_a_sentence():
    config = TrainConfig.from_preset("shapes-32", out="x", batch_size=64)
    with pytest.raises(InputError, match="^batch_size must be divisible by the number of processes = 3, got 64$"):
        config.micro_batches(3)
    config = TrainConfig.from_preset("shapes-32", out="x", batch_size=64, micro_batch_size=24)
    with pytest.raises(InputError, match="number of processes x micro_batch_size = 2 x 24, got 64$"):
        config.micro_batches(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": -1}, "micro_batch_size must be at least 0, got -1"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"sigma_growth": 1.0}, "sigma_growth must be more than 1, got 1.0"),
        ({"on_divergence": "panic"}, "on_divergence must be one of stop, rollback, got 'panic'"),
        ({"timeout": 0}, "timeout must be at least 1, got 0"),
        ({"loss": "hinges"}, "loss must be one of hinge, non_saturating, wasserstein, relativistic, got 'hinges'"),
        ({"r1_gamma": -1.0}, "r1_gamma must be at least 0, got -1.0"),
        ({"penalty_every": 0}, "penalty_every must be at least 1, got 0"),
        ({"lecam_decay": 1.0}, r"lecam_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_of_long_runs_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_preset("shapes-32", out="x", **change)


def test_the_number_of_classes_is_that_of_the_data_unless_it_is_given():
    config = TrainConfig.from_preset("cifar-32", out="x", data="folder:photos")
    for_data = config.with_classes(3)
    assert (for_data.num_classes, for_data.generator.num_classes, for_data.discriminator.num_classes) == (3, 3, 3)
    assert not for_data.classes_from_data and for_data.with_classes(5) == for_data
    given = TrainConfig.from_preset("cifar-32", out="x", data="folder:photos", num_classes=10)
    assert given.with_classes(3) == given
    with pytest.raises(
        InputError, match="has no classes: .* the presets faces-128, faces-64, r3-64, or add --num-classes 0"
    ):
        config.with_classes(0)
    unconditional = TrainConfig.from_preset("faces-64", out="x", data="folder:photos")
    assert unconditional.with_classes(3).num_classes == 0
