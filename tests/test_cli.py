"The commands as a shell or a scheduler meets them: help, dry runs, sentences, exit codes, signals, kills, shards, and names that must not leave."
import json
import os
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.script import anno_parser

from sbldm_nb.cohort import Cohort
from sbldm_nb.data import read_image
from sbldm_nb.ldm import Inpainting, LatentDiffusion, SlicePosition, numbers_written, save_vae, write_samples
from sbldm_nb.metrics import compute_metrics_on_folder
from sbldm_nb.schedules import get_schedule
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentSpace

ROOT = Path(__file__).resolve().parent.parent
SHORT = ['data.subjects=4', 'data.held_out=2', 'data.slices=2', 'vae.training.batch=2', 'diffusion.training.batch=2']


def commands():
    "Name -> (module, function) of every console script."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return {name: tuple(place.split(':')) for name, place in (line.split('=') for line in ini['DEFAULT']['console_scripts'].split())}


def function_of(name):
    module, function = commands()[name]
    return getattr(import_module(module), function)


def call(name, *words, **options):
    "The command in this process: its exit code, or the sentence that goes to the error stream."
    try: function_of(name)(*map(str, words), **options)
    except SystemExit as e: return e.code
    return 0


@pytest.fixture(scope='module', autouse=True)
def own_places(tmp_path_factory):
    "Pseudonyms and caches of these tests, which the processes they start inherit."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SBLDM_ID_KEY', 'a key for these tests only')
        m.setenv('SBLDM_CACHE', str(tmp_path_factory.mktemp('cache')))
        m.setenv('PYTHONPATH', os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
        yield


@pytest.fixture(scope='module')
def work(tmp_path_factory): return tmp_path_factory.mktemp('work')


def start(work, name, *words):
    "The script that pip installs, in a process of its own."
    module, function = commands()[name]
    script = work/name
    script.write_text(f'import sys\nfrom {module} import {function}\nif __name__ == "__main__": sys.exit({function}())\n')
    return subprocess.Popen([sys.executable, '-u', script, *map(str, words)], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def shell(work, name, *words):
    "(exit code, output, errors)"
    process = start(work, name, *words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def model_of(folder, task, dims=3, size=(16, 16, 16)):
    "An untrained model."
    torch.manual_seed(0)
    space = LatentSpace(AutoencoderKL(dims=dims, channels=(8, 8), latent_channels=2))
    net = UNet(**dict(dims=dims, in_channels=2, channels=(8, 8), attention=(False, False)) | task.needs(space))
    return LatentDiffusion(space, net, get_schedule('flow'), task, size=size).save_pretrained(folder)


def test_every_command_explains_itself_and_can_be_rehearsed():
    for name in commands():
        parser = anno_parser(function_of(name).__wrapped__, name)
        text = parser.format_help()
        for action in parser._actions: assert action.help, (name, action.dest)
        assert '--dry_run' in text and '--debug' in text, name
        with pytest.raises(SystemExit) as stop: parser.parse_args(['--no_such_option'])
        assert stop.value.code == 2


def test_data_commands_start_without_torch(work):
    code = 'import sys; from sbldm_nb import cli; print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=work).stdout == 'False\n'


def test_wrong_usage_and_refusal_are_told_apart(work):
    assert shell(work, 'sbldm_preprocess', 'only one')[0] == 2
    code, out, err = shell(work, 'sbldm_preprocess', 'nowhere', 'out')
    assert (code, err) == (1, 'nowhere: no such folder\n')
    code, out, err = shell(work, 'sbldm_preprocess', 'nowhere', 'out', '--debug')
    assert code == 1 and 'Traceback' in err
    assert not (work/'out').exists()


def test_system_refuses_and_the_sentence_names_no_file_inside(work):
    Cohort(3, spacing=8.).write(work/'DOE', 'brats')
    (work/'locked').write_text('a file where a folder is wanted')
    code, out, err = shell(work, 'sbldm_preprocess', 'DOE', 'locked/cache')
    assert code == 1 and len(err.splitlines()) == 1 and 'locked' in err and 'SIM-' not in err, err


# training

@pytest.fixture(scope='module')
def vae(work):
    "An untrained autoencoder."
    save_vae(AutoencoderKL(dims=2, channels=(8, 16), latent_channels=8), work/'vae'/'model')
    return 'vae'


def test_rehearsal_writes_nothing(work, vae, capsys):
    before, cache = content(work), content(Path(os.environ['SBLDM_CACHE']))
    for name, *words in (('sbldm_train_vae', 'cohort', work/'x'), ('sbldm_train_diffusion', 'cohort', work/'x', work/vae), ('sbldm_ablation', work/'x'),
                         ('sbldm_download', 'brats2020', work/'x')):
        function_of(name)(*map(str, words), dry_run=True)
        assert capsys.readouterr().out.endswith('dry run: nothing was written\n')
    assert content(work) == before and content(Path(os.environ['SBLDM_CACHE'])) == cache


@pytest.mark.parametrize('how, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_checkpoint_and_an_exit_code(work, vae, how, code):
    out, words = f'ldm-{code}', ('cohort', f'ldm-{code}', '--vae', vae, '--set', *SHORT, 'diffusion.training.budget=60')
    process = start(work, 'sbldm_train_diffusion', *words)
    log = work/out/'log.jsonl'
    while process.poll() is None and not (log.exists() and log.stat().st_size): time.sleep(.05)
    process.send_signal(how)
    text, err = process.communicate(timeout=60)
    assert process.returncode == code and 'Traceback' not in err, err
    assert f'stopped by {how.name}' in text
    assert list((work/out/'checkpoints').iterdir()) and not (work/out/'model').exists()


def test_time_limit_is_exit_code_3_and_the_same_command_ends_with_0(work, vae):
    words = ('cohort', 'ldm', '--vae', vae, '--set', *SHORT, 'diffusion.training.max_steps=4')
    code, out, err = shell(work, 'sbldm_train_diffusion', *words, 'diffusion.training.max_hours=1e-9')
    assert code == 3 and 'the same command goes on' in out, err
    code, out, err = shell(work, 'sbldm_train_diffusion', *words)
    assert code == 0 and 'resumed' in out, out + err
    assert (work/'ldm'/'model'/'config.json').exists()
    assert call('sbldm_report', work/'ldm') == 0
    page = (work/'ldm'/'report.html').read_text()
    assert 'Configuration' in page and 'Model card' in page and 'data:image/png' in page and '<script' not in page


# images

@pytest.fixture(scope='module')
def slices(work): return model_of(work/'slices', SlicePosition(), dims=2, size=(32, 32)).name


def test_shards_and_kills_give_the_same_samples(work, slices):
    how = dict(n=12, positions='.1,.2,.3', steps=2, batch=2)
    assert call('sbldm_sample', work/slices, work/'whole', **how) == 0
    assert numbers_written(work/'whole') == list(range(12))
    process = start(work, 'sbldm_sample', slices, 'parts', *(word for k, v in how.items() for word in (f'--{k}', v)), '--shard', '1/2')
    while process.poll() is None and not numbers_written(work/'parts'): time.sleep(.01)
    process.kill()
    process.communicate()
    for shard in ('1/2', '2/2'): assert call('sbldm_sample', work/slices, work/'parts', **how, shard=shard) == 0
    a, b = ({k: v for k, v in content(work/f).items() if k.endswith('.nii.gz')} for f in ('whole', 'parts'))
    assert a.keys() == b.keys()
    for k in a: np.testing.assert_allclose(read_image(work/'whole'/k).get_fdata(), read_image(work/'parts'/k).get_fdata(), atol=1e-5)
    assert 'other settings' in call('sbldm_sample', work/slices, work/'parts', **how, seed=1)


def test_folder_of_holes_with_one_bad_case(work):
    source = Cohort(2, spacing=8.).write(work/'holes', 'inpainting')
    bad = sorted(source.rglob('*-mask-0000.nii.gz'))[0]
    bad.write_bytes(b'not an image')
    model_of(work/'filler', Inpainting())
    code, out, err = shell(work, 'sbldm_inpaint', 'filler', 'holes', 'filled', '--steps', 2)
    failures = [line for line in out.splitlines() if ' failed: ' in line]
    assert code == 1 and len(failures) == 1 and 'mask-0000' in failures[0] and 'SIM-' not in out + err, out + err
    names = sorted(p.name for p in (work/'filled').iterdir())
    assert len([n for n in names if n.endswith('_inpainted.nii.gz')]) == 5 and not [n for n in names if 'SIM-' in n], names
    done = content(work/'filled')
    assert call('sbldm_inpaint', work/'filler', work/'holes', work/'filled', steps=2) == 1
    assert content(work/'filled') == done


def test_evaluation_gives_the_functions_numbers(work):
    rng = torch.Generator().manual_seed(0)
    for name in ('real', 'generated'): write_samples(torch.rand(12, 1, 32, 32, generator=rng)*2 - 1, work/name)
    assert call('sbldm_evaluate', work/'real', work/'generated', work/'numbers'/'metrics.json') == 0
    assert json.loads((work/'numbers/metrics.json').read_text()) == json.loads(json.dumps(compute_metrics_on_folder(work/'generated', work/'real')))
