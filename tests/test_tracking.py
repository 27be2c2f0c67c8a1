"What a run says, with real processes: killed while they log, in a terminal and in a file, two at once, in a live kernel; read back by TensorBoard's and MLflow's own readers."
import csv
import importlib.util
import io
import json
import logging
import os
import pty
import queue
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image

from sbldm_nb.tracking import LossPlot, RunLog, encode_picture, preview_picture, tracking_arguments

with_mlflow = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ('mlflow', 'sqlalchemy', 'alembic')), reason='MLflow with a database is not installed')

SESSION = '''
import sys, time
import numpy as np
from accelerate import Accelerator
from sbldm_nb.tracking import *
folder, names, first, last, pause = sys.argv[1], sys.argv[2].split(','), *map(float, sys.argv[3:6])
accelerator = Accelerator(cpu=True, **tracking_arguments(names, folder))
start_trackers(accelerator, 'run', dict(lr=2e-3, net=dict(channels=[8, 16])), int(first))
print('open', flush=True)
for step in range(int(first) + 1, int(last) + 1):
    track(accelerator, dict(step=step, epoch=step / 10, loss=1 / step))
    time.sleep(pause)
log_images(accelerator, dict(samples=np.linspace(-1, 1, 2 * 8 * 8).reshape(2, 1, 8, 8)), int(last))
stop_trackers(accelerator)
'''


def session(folder, names, first, last, pause=0., kill_after=None, env=()):
    "Log steps first + 1 to last in a process of its own; where asked, SIGKILL it some seconds after its trackers opened."
    clean = {k: v for k, v in os.environ.items() if not k.startswith('MLFLOW')} | dict(env)
    process = subprocess.Popen([sys.executable, '-c', SESSION, *map(str, (folder, names, first, last, pause))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean, cwd=folder.parent)
    if kill_after is not None:
        assert process.stdout.readline() == 'open\n'
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (0 if kill_after is None else -9), err
    return out


def curve(folder, name='loss'):
    "A curve by TensorBoard's own reader, and the reader."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger('tensorboard').setLevel(logging.ERROR)
    reader = EventAccumulator(str(folder), size_guidance=dict(scalars=0, images=0))
    reader.Reload()
    return [(e.step, e.value) for e in reader.Scalars(name)], reader


def test_a_curve_that_was_killed_and_resumed_has_every_step_once(tmp_path):
    "Killed at a random moment, its event file cut in the middle of a record as well, resumed from an earlier step."
    run = tmp_path / 'run'
    session(run, 'tensorboard', 0, 10_000, pause=.01, kill_after=random.uniform(.3, .8))
    (events,) = (run / 'tensorboard/run').glob('events*')
    os.truncate(events, events.stat().st_size - 7)
    before, _ = curve(run / 'tensorboard/run')
    assert len(before) > 10
    session(run, 'tensorboard', 6, 40)
    after, reader = curve(run / 'tensorboard/run')
    assert [step for step, _ in after] == list(range(1, 41))
    np.testing.assert_allclose([value for _, value in after], [1 / k for k in range(1, 41)], rtol=1e-6)
    picture = Image.open(io.BytesIO(reader.Images('samples')[0].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(picture)[..., 0], preview_picture(np.linspace(-1, 1, 128).reshape(2, 1, 8, 8)))
    assert len(list((run / 'tensorboard/run').glob('*/hparams.yml'))) == 1      # the settings are not noted twice
    begun_again = session(run, 'tensorboard', 0, 3)
    assert begun_again and [step for step, _ in curve(run / 'tensorboard/run')[0]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize('fast', ['true', 'false'])
def test_the_page_that_people_open_shows_the_resumed_curve_once(tmp_path, fast):
    "The real server, with both of its readers, asked over HTTP as its page asks."
    run, port = tmp_path / 'run', random.randint(20_000, 40_000)
    session(run, 'tensorboard', 0, 20)
    session(run, 'tensorboard', 6, 30)
    server = subprocess.Popen([sys.executable, '-m', 'tensorboard.main', '--logdir', str(run), '--port', str(port), '--load_fast', fast, '--window_title', 'x'],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url, points = f'http://localhost:{port}/data/plugin/scalars/scalars?' + urllib.parse.urlencode(dict(run='tensorboard/run', tag='loss')), []
        for _ in range(120):
            try: points = json.load(urllib.request.urlopen(url, timeout=5))
            except (urllib.error.URLError, OSError, ValueError): pass
            if len(points) == 30: break
            time.sleep(.5)
        assert [step for _, step, _ in points] == list(range(1, 31))
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@with_mlflow
def test_mlflow_keeps_one_run_in_the_folder_through_a_kill(tmp_path):
    "Without a server the store lies in the run's folder and nothing lies beside it; the moved folder goes on as well."
    run = tmp_path / 'run'
    session(run, 'mlflow,tensorboard', 0, 10_000, pause=.02, kill_after=1.)
    (tmp_path / 'moved').mkdir()
    run = run.rename(tmp_path / 'moved/other')
    session(run, 'mlflow,tensorboard', 6, 12)
    from mlflow import MlflowClient
    client = MlflowClient(f'sqlite:///{run}/mlflow.db')
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    steps = [m.step for m in client.get_metric_history(found.info.run_id, 'loss')]
    assert found.info.run_id == json.loads((run / 'tracking.json').read_text())['mlflow'] and found.info.status == 'FINISHED'
    assert found.data.params == {'lr': '0.002', 'net.channels': '[8, 16]'}
    assert set(steps) >= set(range(1, 13)) and steps[-6:] == [7, 8, 9, 10, 11, 12]
    assert {p.name for p in tmp_path.iterdir()} == {'moved'} and {p.name for p in (tmp_path / 'moved').iterdir()} == {'other'}
    assert {p.name for p in run.iterdir()} == {'mlflow.db', 'tensorboard', 'tracking.json'}
    session(run, 'mlflow', 0, 2)                                                # begun again: a new run beside the old one
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 2


@with_mlflow
def test_mlflow_goes_where_its_variable_says_and_takes_the_pictures(tmp_path):
    store = f'sqlite:///{tmp_path}/elsewhere.db'
    session(tmp_path / 'run', 'mlflow', 0, 3, env=dict(MLFLOW_TRACKING_URI=store))
    from mlflow import MlflowClient
    client = MlflowClient(store)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert found.data.metrics['loss'] == 1 / 3 and [p.path for p in client.list_artifacts(found.info.run_id, 'previews')] == ['previews/samples-00000003.png']
    assert not (tmp_path / 'run/mlflow.db').exists()


@pytest.mark.slow
@with_mlflow
def test_a_store_that_is_gone_is_one_sentence(tmp_path):
    "The run's number is known, its database was deleted; and no setting of this process is changed by the failure."
    session(tmp_path / 'run', 'mlflow', 0, 3)
    (tmp_path / 'run/mlflow.db').unlink()
    code = SESSION.split('print(')[0].replace('start_trackers', 'import os\ntry: start_trackers', 1) + '''
except ValueError as error: print(error)
print(os.environ.get('MLFLOW_TRACKING_URI'), len(accelerator.trackers))
'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'run'), 'mlflow', '2', '3', '0'], capture_output=True, text=True, cwd=tmp_path)
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r'\S+/run: the trackers of this run \(mlflow\) do not open \(MlflowException\); look at MLFLOW_TRACKING_URI, '
                        'remove tracking.json to begin new curves, or train without trackers', first), done.stdout + done.stderr
    assert second == 'None 0'


@pytest.mark.parametrize('damage', [b'{"name"', b'[]', b'{}', b'{"mlflow": null}', b'{"name": 7, "mlflow": null}', b'\xff'])
def test_a_damaged_note_is_one_sentence(tmp_path, damage):
    from accelerate import Accelerator
    from sbldm_nb.tracking import start_trackers, stop_trackers
    (tmp_path / 'tracking.json').write_bytes(damage)
    accelerator = Accelerator(cpu=True, **tracking_arguments('tensorboard', tmp_path))
    with pytest.raises(ValueError, match='do not open') as error: start_trackers(accelerator, 'run', {}, step=5)
    assert '\n' not in str(error.value) and not accelerator.trackers
    start_trackers(accelerator, 'run', {})
    stop_trackers(accelerator)
    stop_trackers(accelerator)


def test_a_note_names_no_folder_outside(tmp_path):
    from accelerate import Accelerator
    from sbldm_nb.tracking import start_trackers, stop_trackers
    run = tmp_path / 'inner/run'
    run.mkdir(parents=True)
    (run / 'tracking.json').write_text(json.dumps(dict(name='../../../outside', mlflow=None)))
    accelerator = Accelerator(cpu=True, **tracking_arguments('tensorboard', run))
    start_trackers(accelerator, 'run', {}, step=5)
    stop_trackers(accelerator)
    assert [p.name for p in tmp_path.iterdir()] == ['inner'] and (run / 'tensorboard/outside').is_dir()


TWO = '''
import os, sys
from accelerate import Accelerator
from sbldm_nb.tracking import *
for name in ('first', 'second'):
    accelerator = Accelerator(cpu=True, **tracking_arguments('tensorboard', f'{sys.argv[1]}/{name}'))
    start_trackers(accelerator, name, dict(world=accelerator.num_processes))
    for step in (1, 2): track(accelerator, dict(step=step, loss=10. * accelerator.process_index + step))
    stop_trackers(accelerator)
    accelerator.wait_for_everyone()
print(f'rank {accelerator.process_index} of {accelerator.num_processes}', flush=True)
'''


def test_two_processes_write_one_curve_and_live_to_write_another(tmp_path):
    "The second run of the same processes needs the connection that Accelerate's end_training would have ended."
    (tmp_path / 'two.py').write_text(TWO)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', str(tmp_path / 'two.py'), str(tmp_path)],
                          capture_output=True, text=True, timeout=120, env=os.environ | dict(ACCELERATE_USE_CPU='1'))
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r'rank \d of \d', done.stdout)) == ['rank 0 of 2', 'rank 1 of 2']
    for name in ('first', 'second'):
        assert len(list((tmp_path / name / 'tensorboard' / name).glob('events*'))) == 1
        assert curve(tmp_path / name / 'tensorboard' / name)[0] == [(1, 1.), (2, 2.)]


def test_a_log_that_is_killed_while_it_is_written_loses_its_last_line_at_most(tmp_path):
    code = 'import sys\nfrom sbldm_nb.tracking import RunLog\nlog, k = RunLog(sys.argv[1]), 0\nprint("go", flush=True)\nwhile True:\n k += 1\n log.append(step=k, loss=1 / k, text="x" * 5000)\n log.rewind(k) if k % 7 == 0 else 0'
    for trial in range(2):
        path = tmp_path / f'{trial}/log.jsonl'
        path.parent.mkdir()
        process = subprocess.Popen([sys.executable, '-c', code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(random.uniform(.02, .4))
        process.kill()
        process.communicate()
        rows = RunLog(path).rows()
        lines = path.read_bytes().count(b'\n')
        assert len(rows) == lines > 0 and [r['step'] for r in rows] == list(range(1, lines + 1))
        RunLog(path).rewind(3)
        assert [r['step'] for r in RunLog(path).rows()] == [1, 2, 3][:lines]


def test_the_table_opens_elsewhere(tmp_path):
    pandas = pytest.importorskip('pandas')
    log = RunLog(tmp_path / 'log.jsonl')
    rows = [dict(step=10, loss=.1, kl=1e-300), dict(step=20, loss=2 / 3), dict(step=20, valid_loss=float('nan')), dict(step=30, loss=None, note='a, "b"\nc; ü')]
    for row in rows: log.append(**row)
    table = pandas.read_csv(log.write_csv())
    assert list(table.columns) == ['step', 'loss', 'kl', 'valid_loss', 'note'] and table.step.tolist() == [10, 20, 30]
    assert table.loss[1] == 2 / 3 and table.kl[0] == 1e-300 and table.note[2] == 'a, "b"\nc; ü' and table.valid_loss.isna().all()
    with open(log.path.with_suffix('.csv'), newline='') as file: assert len(list(csv.reader(file))) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ['log.csv', 'log.jsonl']
    RunLog(tmp_path / 'empty.jsonl').write_csv()
    assert (tmp_path / 'empty.csv').read_text() == 'step\n'


WORK = '''
import time
from sbldm_nb.tracking import Progress
progress = Progress(240, 50, 16, every=.4, first=200)
for step in range(201, 241):
    time.sleep(.05)
    progress.tick(step, [dict(step=step, loss=.5)])
'''


def lines_of(where, tmp_path):
    "What WORK prints into a file or into a terminal, as bytes, and when it ended."
    if where == 'file':
        with open(tmp_path / 'out', 'wb') as out: subprocess.run([sys.executable, '-c', WORK], stdout=out, check=True)
        return (tmp_path / 'out').read_bytes(), datetime.now()
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, '-c', WORK], stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b''
    while True:
        try: piece = os.read(ours, 4096)
        except OSError: break
        if not piece: break
        said += piece
    os.close(ours)
    assert process.wait() == 0
    return said.replace(b'\r\n', b'\n'), datetime.now()


@pytest.mark.parametrize('where', ['file', 'terminal'])
def test_progress_is_the_same_plain_lines_in_a_terminal_and_in_a_file(where, tmp_path):
    "Forty steps of 50 ms after a resume: a line every .4 s or so, forecasts that come true, no control character."
    said, end = lines_of(where, tmp_path)
    assert not re.search(rb'[\x00-\x09\x0b-\x1f\x7f]', said)
    lines = said.decode().splitlines()
    assert 4 <= len(lines) <= 8 and lines[-1].startswith('step 240/240  epoch 4.8  loss 0.5000  ')
    for line in lines[:-1]:
        step, rate, minutes, seconds, ends = re.fullmatch(r'step (\d+)/240  epoch 4\.\d  loss 0\.5000  (\d+) samples/s  (\d):(\d\d) left  ends (\d\d:\d\d)', line).groups()
        assert 160 < float(rate) <= 320 and int(minutes) == 0 and int(seconds) <= 3
        late = (end - datetime.strptime(ends, '%H:%M').replace(year=end.year, month=end.month, day=end.day)).total_seconds() % 86400
        assert late < 120 or late > 86400 - 60


GROW = '''
import time
plot = LossPlot(folder, log=print)
plot.show()
for step in (30, 40):
    log.append(step=step, loss=1 / step)
    plot(f'step {step}')
'''


def test_the_curve_grows_while_a_cell_is_at_work(tmp_path, monkeypatch):
    "In a live kernel the picture is one widget, and each line of progress sends new bytes to it before the cell has ended; the preview is below."
    for name in ('IN_TEST', 'SBLDM_STATIC', 'KAGGLE_KERNEL_RUN_TYPE'): monkeypatch.delenv(name, raising=False)
    log = RunLog(tmp_path / 'log.jsonl')
    for step in (10, 20): log.append(step=step, loss=1 / step)
    manager, client = start_new_kernel()
    try:
        client.allow_stdin, seen = True, []
        client.execute('from sbldm_nb.tracking import LossPlot, RunLog\nfolder = %r\nlog = RunLog(folder + "/log.jsonl")\n%s' % (str(tmp_path), GROW))
        while not (seen and seen[-1]['msg_type'] == 'status' and seen[-1]['content']['execution_state'] == 'idle'):
            try: seen.append(client.get_iopub_msg(timeout=60))
            except queue.Empty: raise AssertionError(f'no end after {[m["msg_type"] for m in seen]}')
        assert not [m for m in seen if m['msg_type'] == 'error'], seen
        (shown,) = [m['content']['data'] for m in seen if m['msg_type'] == 'display_data']
        assert set(shown) == {'application/vnd.jupyter.widget-view+json', 'image/png', 'text/plain'}
        image = next(m['content']['comm_id'] for m in seen if m['msg_type'] == 'comm_open' and m['content']['data']['state'].get('_model_name') == 'ImageModel')
        pictures = [bytes(m['buffers'][0]) for m in seen if m['msg_type'] == 'comm_msg' and m['content']['comm_id'] == image and m['buffers']]
        assert len(pictures) == 2 and len(set(pictures)) == 2 and all(len(p) <= 60_000 for p in pictures)
        assert np.asarray(Image.open(io.BytesIO(pictures[1]))).std() > 0
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_newest_preview_stands_below_the_curve(tmp_path):
    (tmp_path / 'previews').mkdir()
    RunLog(tmp_path / 'log.jsonl').append(step=1, loss=1.)
    heights = [Image.open(io.BytesIO(LossPlot(tmp_path).png())).height]
    for k, height in enumerate((40, 70)):
        (tmp_path / f'previews/step-{k:08}.png').write_bytes(encode_picture(np.zeros((height, 100), np.uint8)))
        os.utime(tmp_path / f'previews/step-{k:08}.png', (k, k))
        heights.append(Image.open(io.BytesIO(LossPlot(tmp_path).png())).height)
    assert np.diff(heights).tolist() == [40, 30]


def test_a_profile_survives_a_loop_that_breaks(tmp_path):
    "What was recorded before the error is written, and the error is the loop's own."
    from sbldm_nb.tracking import profiled
    with pytest.raises(KeyError, match='broken'):
        with profiled(50, tmp_path / 'profile') as profile:
            for step in range(6):
                np.ones(3).sum()
                profile.step()
            raise KeyError('broken')
    events = json.loads((tmp_path / 'profile/trace.json').read_text())['traceEvents']
    assert {e['name'] for e in events if str(e.get('name', '')).startswith('ProfilerStep')} >= {'ProfilerStep#3', 'ProfilerStep#4'}
    assert (tmp_path / 'profile/table.txt').read_text().strip()


@pytest.mark.slow
def test_the_memory_of_a_child_is_not_that_of_its_parent(tmp_path):
    "A large process starts a small one: what the small one reports is its own, although getrusage gives it the record of the large one."
    code = 'from sbldm_nb.tracking import peak_memory; import resource; print(peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)'
    large = f'import subprocess, sys, os; x = b"x" * (2 << 30); os.execv(sys.executable, [sys.executable, "-c", {code!r}])'
    own, inherited = map(int, subprocess.run([sys.executable, '-c', large], capture_output=True, text=True, check=True).stdout.split())
    assert own < 1500 < 2048 <= inherited
