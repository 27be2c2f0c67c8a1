"The commands as a shell or a scheduler meets them: help, dry runs, sentences, exit codes, signals, kills, shards, and names that must not leave."
import json
import os
import shutil
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
from sbldm_nb.data import make_image, read_image, write_image
from sbldm_nb.ldm import ClassConditional, Inpainting, Interpolation, LatentDiffusion, SlicePosition, numbers_written, save_vae, write_samples
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


def start(work, name, *words, before=()):
    "The script that pip installs, in a process of its own."
    module, function = commands()[name]
    script = work/name
    script.write_text(f'import sys\nfrom {module} import {function}\nif __name__ == "__main__": sys.exit({function}())\n')
    return subprocess.Popen([*before, sys.executable, '-u', script, *map(str, words)], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def shell(work, name, *words, before=()):
    "(exit code, output, errors)"
    process = start(work, name, *words, before=before)
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


def one_line(code):
    "The sentence of a refusal."
    assert isinstance(code, str) and '\n' not in code and len(code) < 500, code
    return code


@pytest.mark.parametrize('command, words, why', [
    ('diffusion', dict(vae='nowhere'), 'nowhere: no such folder, where the run of an autoencoder'),
    ('diffusion', dict(vae='empty'), 'config.json is not there'),
    ('diffusion', dict(vae='three'), 'the autoencoder takes 3D images of 1 channels, the data are 2D images of 1'),
    ('diffusion', dict(vae='two-channels'), 'takes 2D images of 2 channels'),
    ('diffusion', dict(set=['diffusion.network.in_channels=3']), 'in_channels is 3, and 8 is wanted here'),
    ('vae', dict(source='nobody'), "nobody: the cache holds no case of the split 'train'"),
    ('vae', dict(set=['vae.training.batch=99']), '8 training items do not fill one batch of 99'),
    ('diffusion', dict(set=['diffusion.training.batch=99']), '8 training items do not fill one batch of 99'),
    ('vae', dict(set=['vae.training.precision=fp16']), "'fp16' needs a CUDA card"),
    ('vae', dict(set=['vae.training.trackers=tensorbord']), "did you mean 'tensorboard'"),
    ('vae', dict(resume='nowhere'), 'nowhere is not there where a run or a checkpoint is wanted'),
    ('vae', dict(out='/proc/run'), '/proc/run: cannot be written to')])
def test_errors_are_told_before_anything_is_trained(work, vae, monkeypatch, command, words, why):
    if why.startswith("'fp16'") and torch.cuda.is_available(): pytest.skip('this machine has a card')
    monkeypatch.chdir(work)
    (work/'empty').mkdir(exist_ok=True)
    (work/'nobody').mkdir(exist_ok=True)
    (work/'nobody'/'manifest.json').write_text('{"cases": {}}')
    for name, more in (('three', dict(dims=3)), ('two-channels', dict(dims=2, in_channels=2))): save_vae(AutoencoderKL(channels=(8, 16), **more), work/name)
    given = dict(source='cohort', out='refused', set=[]) | (dict(vae=vae) if command == 'diffusion' else {}) | words
    given['set'] = [*SHORT, f'{command}.training.max_steps=2', *given['set']]
    assert why in one_line(call(f'sbldm_train_{command}', given.pop('source'), given.pop('out'), **given))
    assert not (work/'refused'/'model').exists() and not list((work/'refused').glob('checkpoints/*'))


def test_a_folder_without_the_right_to_write(work):
    "One sentence, and nothing is there. (Root may write anywhere, unless this power is taken from its process.)"
    (work/'locked-out').mkdir()
    (work/'locked-out').chmod(0o555)
    before = ['setpriv', '--bounding-set=-dac_override,-dac_read_search'] if os.getuid() == 0 else []
    if before and shutil.which('setpriv') is None: pytest.skip('root cannot be kept from writing here')
    code, out, err = shell(work, 'sbldm_train_vae', 'cohort', 'locked-out/run', '--set', *SHORT, 'vae.training.max_steps=2', before=before)
    assert (code, err.splitlines()[-1:]) == (1, ['locked-out/run: cannot be written to (Permission denied)']) and 'Traceback' not in err, out + err
    assert not os.listdir(work/'locked-out')


# images

@pytest.mark.parametrize('name, words, why', [('sbldm_interpolate', ('scan.zip', 'x.nii.gz'), 'a model of the task Interpolation is wanted, this one is SlicePosition'),
                                              ('sbldm_inpaint', ('holes', 'x'), 'a model of the task Inpainting or Unconditional is wanted, this one is SlicePosition')])
def test_a_model_of_another_task_is_refused_before_anything_is_read(work, slices, name, words, why):
    assert why in one_line(call(name, work/slices, *words, dry_run=True))


def test_thin_slices_are_drawn_as_the_configuration_says(work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    model_of(work/'ct', Interpolation())
    (work/'ct'/'config.yaml').write_text('name: mine\nsampling: {steps: 3, sampler: ddim}\n')
    write_image(make_image(np.zeros((16, 16, 3), np.int16), np.diag([1., 1., 5., 1.])), work/'thick.nii.gz')
    assert call('sbldm_interpolate', 'ct', 'thick.nii.gz', 'thin.nii.gz') == 0
    text = capsys.readouterr().out
    assert '3 steps of ddim' in text and '3 of 3 steps' in text
    model = LatentDiffusion.from_pretrained(work/'ct')
    wanted = model.interpolate(read_image('thick.nii.gz'), steps=3, sampler='ddim')
    np.testing.assert_allclose(read_image('thin.nii.gz').get_fdata(), wanted.get_fdata(), atol=1e-3)


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


def test_an_unknown_class_is_a_sentence(work):
    model_of(work/'classes', ClassConditional(('HC', 'TLE')))
    assert 'AD' in one_line(call('sbldm_sample', work/'classes', work/'none', n=1, label='AD', dry_run=True))
    assert one_line(call('sbldm_sample', work/'classes', work/'none', n=1, dry_run=True)).endswith('give --label')


def test_a_refused_command_leaves_nothing_in_the_way_of_the_right_one(work, slices, monkeypatch):
    monkeypatch.chdir(work)
    for words, why in ((dict(sampler='hein'), "did you mean 'heun'"), (dict(steps=0), '1 step or more'), (dict(seed=-1), 'seed, guidance and cfg are 0 or more'),
                       (dict(guidance=float('nan')), 'seed, guidance and cfg'), (dict(positions='nan'), 'numbers with commas'), (dict(positions=None), 'give --positions')):
        assert why in one_line(call('sbldm_sample', slices, 'right', **(dict(n=2, positions='.1', steps=2) | words)))
        assert not Path('right').exists()
    Path('right').mkdir()
    Path('right/samples.json').write_text('{"of": "a process that was killed before its first sample"}')
    assert call('sbldm_sample', slices, 'right', n=2, positions='.1', steps=2) == 0 and len(numbers_written('right')) == 2
    assert 'other settings' in call('sbldm_sample', slices, 'right', n=2, positions='.1', steps=3)


@pytest.mark.parametrize('name, words, options, why', [
    ('sbldm_sample', ('nowhere', 'x'), {}, 'nowhere: no such folder, where the run of sbldm_train_diffusion'),
    ('sbldm_interpolate', ('slices', 'scan.zip', 'x'), dict(samples=0), '1 sample or more, got None and 0'),
    ('sbldm_inpaint', ('slices', 'holes', 'x'), dict(steps=0), '1 step or more'),
    ('sbldm_sample', ('slices', 'x'), dict(positions='.1', label='AD'), 'takes no label'),
    ('sbldm_sample', ('unfinished', 'x'), {}, 'unfinished: the run there has not come to its end'),
    ('sbldm_report', ('a-run',), dict(metrics='nope.json'), 'nope.json: no such file or folder'),
    ('sbldm_report', ('a-run',), dict(out='a-file/page.html'), 'a-file/page.html: a file stands where a folder is wanted'),
    ('sbldm_preprocess', ('pictures', 'a-file'), {}, 'a-file: a file stands where a folder is wanted'),
    ('sbldm_preprocess', ('pictures', 'x'), dict(window='40,-400'), 'a width above 0')])
def test_a_refusal_names_what_was_written_wrong(work, slices, monkeypatch, name, words, options, why):
    monkeypatch.chdir(work)
    for folder in ('unfinished/checkpoints', 'a-run'): Path(folder).mkdir(parents=True, exist_ok=True)
    Path('a-run/log.jsonl').write_text('{"step": 1, "loss": 1.0}\n')
    Path('a-file').touch()
    if not Path('pictures').exists(): Cohort(4, spacing=8.).write('pictures', 'png')
    assert why in one_line(call(name, *words, **options))
    assert not Path('x').exists()
