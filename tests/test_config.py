"Configurations as users write them: files on disk, words of a command line, YAML with all its traps."
import dataclasses
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sbldm_nb.config import PRESETS, Config, DataConfig, Dumper, SamplingConfig, TrainingConfig, VAEConfig, load_config, merge, presets, read_yaml, save_config

assets = Path(__file__).resolve().parent.parent/'sbldm_nb'/'assets'/'presets'


def test_every_file_is_a_preset_and_every_preset_a_file():
    assert {p.stem for p in assets.glob('*')} == set(PRESETS) == set(presets())


@pytest.mark.parametrize('name', PRESETS)
def test_round_trip(name, tmp_path):
    config = load_config(name)
    path = save_config(config, tmp_path/'deep'/'config.yaml')
    assert load_config(path) == config and load_config(str(path)) == config
    assert yaml.safe_load(path.read_text())['name'] == name                     # any YAML reader reads it
    changed = load_config(name, ['data.seed=3'.replace('seed', 'subjects')])
    assert changed != config and replace(changed, data=config.data) == config   # and nothing else moved


@given(lr=st.floats(1e-12, 1e3), betas=st.tuples(st.floats(0, 1), st.floats(0, 1)), warmup=st.integers(0, 10**9), about=st.text(max_size=40),
       trackers=st.lists(st.sampled_from(['tensorboard', 'mlflow'])), size=st.lists(st.integers(1, 999), min_size=2, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_values_survive_the_file(lr, betas, warmup, about, trackers, size, tmp_path_factory):
    training = TrainingConfig(epochs=3, lr=lr, betas=betas, warmup=warmup, trackers=tuple(trackers))
    config = Config('mine', about, DataConfig(size=tuple(size)), VAEConfig(dict(dims=2, channels=[8, 16]), training), sampling=SamplingConfig(cfg=lr))
    path = tmp_path_factory.mktemp('c')/'c.yaml'
    assert load_config(save_config(config, path)) == config


def test_a_file_may_extend_a_preset_or_another_file(tmp_path):
    mine, child = tmp_path/'mine.yaml', tmp_path/'child.yml'
    mine.write_text('extends: debug\nname: mine\nvae:\n  training: {epochs: 7, lr: 1e-4}\n')
    child.write_text(f'extends: {mine}\nname: child\ndata: {{slices: 4}}\n')
    config, debug = load_config(child), load_config('debug')
    assert (config.name, config.data.slices, config.vae.training.epochs, config.vae.training.budget, config.vae.training.lr) == ('child', 4, 7, None, 1e-4)
    assert config.diffusion == debug.diffusion and config.vae.network == debug.vae.network
    child.write_text(f'extends: {child}\nname: child\n')
    with pytest.raises(ValueError, match='extends itself'): load_config(child)
    mine.write_text(f'extends: {child}\n')
    child.write_text(f'extends: {mine}\n')
    with pytest.raises(ValueError, match='extends itself'): load_config(child)


@pytest.mark.parametrize('text, key, wanted', [
    ('vae.training.lr=1e-4', 'vae.training.lr', 1e-4), ('vae.training.lr=3', 'vae.training.lr', 3.), ('vae.training.lr= 1E-4 ', 'vae.training.lr', 1e-4),
    ('data.size=32,32,16', 'data.size', (32, 32, 16)), ('data.size=[32, 32]', 'data.size', (32, 32)), ('data.roles=t1n', 'data.roles', ('t1n',)),
    ('data.levels=none', 'data.levels', None), ('data.levels=-3,25.5', 'data.levels', (-3., 25.5)), ('diffusion.training.compile=true', 'diffusion.training.compile', True),
    ('vae.network.channels=16,32', 'vae.network.channels', [16, 32]), ('vae.patch=32,32', 'vae.patch', (32, 32)), ('data.augment={}', 'data.augment', dict(flips=['x'])),
    ('about=a=b, c', 'about', None), ('about=ten, or so: 1:30', 'about', None), ('data.groups=HC,TLE-L', 'data.groups', ('HC', 'TLE-L'))])
def test_overrides(text, key, wanted):
    if key == 'about':
        with pytest.raises(ValueError): load_config('debug', [text])    # a comma makes a list, a colon a mapping: refused, not guessed
        return
    value = load_config('debug', [text])
    for part in key.split('.'): value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize('text, why', [
    ('vae.trainning.lr=1', "key of vae 'trainning' is unknown (did you mean 'training'?)"), ('vae.training.l=1', "'l' is unknown"),
    ('data.size=a,b', "data.size wants a whole number, got 'a'"), ('data.size=3.5,4', 'data.size wants a whole number, got 3.5'), ('vae.training.lr=.inf', "got '.inf'"),
    ('vae.training.lr=1e999', 'wants a finite number'), ('vae.training.lr=', 'vae.training.lr wants a finite number, got None'), ('vae.training=3', 'vae.training wants keys with values'),
    ('vae.network=3', 'vae.network wants keys with values'), ('data=none', 'data'), ('vae.training.epochs=0', 'vae.training: a training wants exactly one of'),
    ('vae.training.budget=none', 'exactly one of'), ('vae.training.batch=0', 'a batch of 1 or more'), ('diffusion.cache=disc', "did you mean 'disk'"), ('data.kind=slice', "did you mean 'slices'"),
    ('data.layout=bratz', "did you mean 'brats'"), ('sampling.sampler=hein', "did you mean 'heun'"), ('vae.network.name=brats16', "did you mean 'brats_16g'"),
    ('diffusion.network.name=DiT3D_S4', "network.name 'DiT3D_S4' is unknown"), ('diffusion.schedule.gama=3', "did you mean 'gamma'"), ('diffusion.task.name=none', 'diffusion.task.name None is unknown'),
    ('diffusion.frequency.cutoff=3', "did you mean 'cutoff_ratio'"), ('data.augment.flip=x', "did you mean 'flips'"), ('vae.loss.kll=3', "did you mean 'kl'"),
    ('data.size', 'section.key=value'), ('=3', 'section.key=value'), ('data..size=3', 'section.key=value'), ('data.size=[3', 'not readable as YAML'), ('vae.training.lr.x=3', 'lr wants a finite number'),
    ('vae.training.compile=no', "wants true or false, got 'no'"), ('vae.training.compile=1', 'wants true or false, got 1'), ('vae.training.warmup=true', 'whole number, got True')])
def test_what_is_wrong_is_said_in_one_sentence(text, why):
    with pytest.raises(ValueError) as e: load_config('debug', [text])
    assert why in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('content, why', [
    ('', 'wants keys with values, got None'), ('- a\n- b', 'wants keys with values'), ('3', 'wants keys with values'), ('name: x\nname: y', "'name' stands there twice"), ('1: x', 'a key has to be a text'),
    ('name: x\ndta: {}', "did you mean 'data'"), ('about: x', 'name is missing'), ('name: x\nvae: {training: {epochs: 3}}', 'vae.network is missing'),
    ('name: x\nvae: {network: {}, training: {}}', 'exactly one of'), ('name: [x]', 'name wants a text'), ('name: !!python/object/apply:os.system [ls]', 'not readable as YAML'),
    ('name: !!binary aGk=', 'name wants a text'), ('? {a: b}\n: c', 'a key has to be a text'), ('a: &a [*a]', ''), ('[' * 5000, ''), ('\x00', 'not readable as YAML'),
    ('name: 2001-01-01\ndata: {spacing: 1_000}', "spacing wants a finite number, got '1_000'"), ('extends: 3', 'extends wants a text, got 3'), ('extends: [debug]', 'extends wants a text'), ('extends: nowhere.yaml', 'no such file')])
def test_files_of_every_kind(content, why, tmp_path):
    path = tmp_path/'mine.yaml'
    path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError)) as e: load_config(path)
    assert why in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.yaml: no such file'): load_config('nowhere.yaml')
    with pytest.raises(ValueError, match="preset 'debgu' is unknown .did you mean 'debug'"): load_config('debgu')
    with pytest.raises(FileNotFoundError): load_config(tmp_path.with_suffix('.yaml'))
    (tmp_path/'latin.yaml').write_bytes('name: Zo\xeb'.encode('latin-1'))
    with pytest.raises(ValueError, match='not a text in UTF-8'): load_config(tmp_path/'latin.yaml')


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12))
@settings(max_examples=150, deadline=None)
def test_our_yaml_reads_what_it_writes(value):
    assert read_yaml(yaml.dump(value, Dumper=Dumper), 'x') == value


def test_lengths_take_each_others_place():
    base = dict(training=dict(budget=3, lr=1), keep=1)
    assert merge(base, dict(training=dict(epochs=2))) == dict(training=dict(lr=1, epochs=2), keep=1)
    assert merge(base, dict(training=dict(lr=2))) == dict(training=dict(budget=3, lr=2), keep=1)
    assert base == dict(training=dict(budget=3, lr=1), keep=1)
    assert merge(merge(base, dict(training=dict(max_steps=4))), dict(training=dict(budget=None)))['training'] == dict(lr=1, max_steps=4, budget=None)


def test_every_field_is_explained():
    "Each line of a dataclass that holds a field ends with a comment."
    import inspect
    from sbldm_nb import config
    for cls in (c for c in vars(config).values() if isinstance(c, type) and is_dataclass(c) and c.__module__ == config.__name__):
        lines = inspect.getsource(cls).splitlines()
        for f in fields(cls):
            line = next(x for x in lines if x.strip().startswith(f'{f.name}:'))
            assert '#' in line or f.name in ('name', 'training', 'data', 'sampling', 'perceptual_weight'), (cls.__name__, f.name)
        assert dataclasses.fields(cls) and cls.__dataclass_params__.frozen


def test_a_wheel_without_a_source_tree_has_the_presets(tmp_path):
    "The presets are found through the package, wherever the process stands."
    code = 'from sbldm_nb.config import presets; print(len(presets()))'
    assert subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == str(len(PRESETS))
