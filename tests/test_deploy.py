"""What `deploy/` says is true: the image's recipe builds the package from what reaches it, the manifests are valid Kubernetes, agree with themselves, and run our commands."""
import fnmatch
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).resolve().parent.parent
deploy = root/'deploy'
manifests = {p.name: list(yaml.safe_load_all(p.read_text())) for p in sorted((deploy/'kubernetes').glob('*.yaml'))}
documents = [d for found in manifests.values() for d in found]
jobs = {d['metadata']['name']: d for d in documents if d['kind'] == 'Job'}
versions = sorted({v for v in kubernetes_validate.utils.all_versions() if tuple(map(int, v.split('.')[:2])) >= (1, 29)})

def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def instructions():
    "The Dockerfile as (word, rest), continued lines joined."
    text = re.sub(r'^#.*\n', '', (deploy/'Dockerfile').read_text(), flags=re.M).replace('\\\n', ' ')
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]

def of(word): return [rest for w, rest in instructions() if w == word]

def passes(path: str) -> bool:
    "Whether .dockerignore lets a file through: the last line that matches it or a folder above it decides."
    through, parents = True, ['/'.join(path.split('/')[:n]) for n in range(1, path.count('/') + 2)]
    for line in (root/'.dockerignore').read_text().split('\n'):
        if not line or line.startswith('#'): continue
        pattern = line.lstrip('!')
        match = (lambda p: fnmatch.fnmatch(p.rsplit('/', 1)[-1], pattern[3:])) if pattern.startswith('**/') else (lambda p: fnmatch.fnmatch(p, pattern) and p.count('/') <= pattern.count('/'))
        if any(map(match, parents)): through = line.startswith('!')
    return through

def copied(n: int) -> list:
    "Files of this repository that the first `n` COPY instructions bring."
    names = [name for rest in of('COPY')[:n] for name in rest.split()[:-1]]
    tracked = [p for name in names for p in ([root/name] if (root/name).is_file() else (root/name).rglob('*'))]
    return [str(p.relative_to(root)) for p in tracked if p.is_file() and passes(str(p.relative_to(root)))]

# the image

def test_what_is_copied_exists_and_reaches_the_builder():
    for rest in of('COPY'):
        *names, target = rest.split()
        for name in names: assert (root/name).exists() and passes(name), name
        assert target.startswith('./')
    assert not of('ADD')

def test_nothing_else_reaches_the_builder():
    for name in ('.git/config', '.env', 'outputs/demo/report.html', 'nbs/index.ipynb', 'tests/test_deploy.py', 'id_rsa', 'sbldm_nb/__pycache__/cli.cpython-312.pyc', '.venv/bin/python', 'kaggle.json'):
        assert not passes(name), name
    context = {p.name for p in root.iterdir() if passes(p.name)}
    assert context == {name.rstrip('/') for rest in of('COPY') for name in rest.split()[:-1]}

def wheel_of(files, folder):
    "The wheel that the image's pip would make of these files."
    for name in files:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/name, folder/name)
    (folder/'README.md').touch()
    done = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder/'dist', folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next((folder/'dist').glob('*.whl')))

def test_both_installs_of_the_image_find_what_they_need(tmp_path):
    first = wheel_of(copied(1), tmp_path/'first')
    whole = wheel_of(copied(len(of('COPY'))), tmp_path/'whole')
    assert not [n for n in first.namelist() if n.endswith('.py')], 'the first layer is about what the package stands on'
    required = lambda wheel: sorted(l for l in wheel.read(next(n for n in wheel.namelist() if n.endswith('METADATA'))).decode().splitlines() if l.startswith('Requires-Dist'))
    assert required(first) == required(whole) != []
    wanted = {str(p.relative_to(root)) for p in (root/'sbldm_nb').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert wanted <= set(whole.namelist())
    scripts = whole.read(next(n for n in whole.namelist() if n.endswith('entry_points.txt'))).decode()
    for job in jobs.values(): assert command(job)[0] + ' =' in scripts or command(job)[0] + '=' in scripts

def test_every_version_in_the_image_is_pinned():
    installs = [line for rest in of('RUN') for line in rest.split('&&') if 'pip install' in line]
    assert len(installs) == 2 and '-c constraints.txt' in installs[0] and '--no-deps' in installs[1]
    extras = re.search(r'"\.\[([\w,]+)\]"', installs[0])[1].split(',')
    python = re.fullmatch(r'python:(\d+\.\d+)-slim-\w+', *of('FROM'))[1]
    env = dict(python_version=python, python_full_version=python + '.0')
    pins = [Requirement(line) for line in (root/'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    pinned = {canonicalize_name(p.name) for p in pins if p.marker is None or p.marker.evaluate(env)}
    cfg = settings()
    for key in ('requirements', *(f'{extra}_requirements' for extra in extras)):
        for text in cfg[key].split(): assert canonicalize_name(Requirement(text).name) in pinned, f'{text} of {key}'

def test_the_image_runs_as_nobody_in_particular_and_holds_no_secret():
    words = [w for w, _ in instructions()]
    user, group = map(int, of('USER')[-1].split(':'))
    assert user > 0 and group > 0 and words.index('USER') > max(i for i, w in enumerate(words) if w in ('RUN', 'COPY'))
    for job in jobs.values():
        assert (pod(job)['securityContext']['runAsUser'], pod(job)['securityContext']['runAsGroup']) == (user, group)
    for rest in of('ENV') + of('ARG'): assert not re.search(r'key|token|secret|passw|credential', rest, re.I), rest
    assert not re.search(r'curl|wget|git clone', ' '.join(of('RUN')))
    assert yaml.safe_load(of('ENTRYPOINT')[0])[0] == 'tini'
    assert yaml.safe_load(of('CMD')[0])[0] in [s.split('=')[0] for s in settings()['console_scripts'].split()]

# the manifests

@pytest.mark.parametrize('version', versions)
def test_manifests_are_valid(version):
    for document in documents: kubernetes_validate.validate(document, version, strict=True)

def test_the_validator_sees_a_misspelt_field_and_a_wrong_type():
    assert len(versions) >= 5
    for change in (dict(completionsMode='Indexed'), dict(completions='eight')):
        bad = {**jobs['sbldm-sample'], 'spec': jobs['sbldm-sample']['spec'] | change}
        with pytest.raises(kubernetes_validate.ValidationError): kubernetes_validate.validate(bad, versions[-1], strict=True)

def pod(job): return job['spec']['template']['spec']
def main(job): return pod(job)['containers'][0]
def environment(job): return {e['name']: e['value'] for e in main(job).get('env', []) if 'value' in e}
def script(job): return main(job)['args'][-1].strip()

def arguments(job, index=0):
    "The words of a Job's command line as the shell in pod `index` makes them."
    line = script(job).replace('exec ', 'printf "%s\\n" ', 1)
    done = subprocess.run(['/bin/sh', '-c', line], env={**environment(job), 'JOB_COMPLETION_INDEX': str(index)}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()

def command(job, index=0):
    "Our part of it."
    words = arguments(job, index)
    return words[words.index('--no-python') + 1:] if words[0] == 'torchrun' else words

def gibibytes(text): return float(re.fullmatch(r'(\d+)Gi', text)[1])

everyone = pytest.mark.parametrize('name', jobs)

@everyone
def test_pods_keep_to_the_restricted_standard(name):
    own, shared = main(jobs[name])['securityContext'], pod(jobs[name])['securityContext']
    assert shared['runAsNonRoot'] is True and shared['seccompProfile']['type'] == 'RuntimeDefault'
    assert own['allowPrivilegeEscalation'] is False and own['readOnlyRootFilesystem'] is True and own['capabilities'] == {'drop': ['ALL']}
    assert pod(jobs[name])['automountServiceAccountToken'] is False and not any(pod(jobs[name]).get(k) for k in ('hostNetwork', 'hostPID', 'hostIPC'))

@everyone
def test_volumes_exist_and_suffice(name):
    spec, container = pod(jobs[name]), main(jobs[name])
    claims = {d['metadata']['name'] for d in documents if d['kind'] == 'PersistentVolumeClaim'}
    mounts = {m['name']: m for m in container['volumeMounts']}
    assert {v['name'] for v in spec['volumes']} == set(mounts)
    assert {m['mountPath'] for m in mounts.values()} >= {'/workspace', '/tmp'}
    for volume in spec['volumes']:
        if 'persistentVolumeClaim' in volume:
            assert volume['persistentVolumeClaim']['claimName'] in claims
            assert volume['persistentVolumeClaim'].get('readOnly', False) == mounts[volume['name']].get('readOnly', False)
    memory = sum(gibibytes(v['emptyDir']['sizeLimit']) for v in spec['volumes'] if v.get('emptyDir', {}).get('medium') == 'Memory')
    assert memory <= gibibytes(container['resources']['limits']['memory']) / 2, 'shared memory counts as memory of the pod'
    assert (memory > 0) == (arguments(jobs[name])[0] == 'torchrun'), 'a loader of several processes needs more than the usual 64 MiB of /dev/shm'
    for word in command(jobs[name]):
        if word.startswith('/'): assert any(word.startswith(m['mountPath'] + '/') or word == m['mountPath'] for m in mounts.values()), word

@everyone
def test_resources_agree(name):
    resources = main(jobs[name])['resources']
    assert resources['requests']['memory'] == resources['limits']['memory']
    assert resources['requests'].get('nvidia.com/gpu') == resources['limits'].get('nvidia.com/gpu')
    assert ('nvidia.com/gpu' in resources['limits']) == ('preprocess' not in name)

@everyone
def test_failures_are_judged_by_their_cause(name):
    spec, rules = jobs[name]['spec'], jobs[name]['spec']['podFailurePolicy']['rules']
    assert pod(jobs[name])['restartPolicy'] == 'Never', 'podFailurePolicy wants it'
    assert rules[0] == dict(action='Ignore', onPodConditions=[dict(type='DisruptionTarget', status='True')])
    for rule in rules[1:]: assert rule['onExitCodes']['containerName'] == main(jobs[name])['name']
    by_torchrun = arguments(jobs[name])[0] == 'torchrun'
    assert by_torchrun or any(r['action'] == 'FailJob' and r['onExitCodes']['values'] == [2] for r in rules[1:])
    if by_torchrun: assert spec['backoffLimit'] >= 3 * spec.get('completions', 1)
    else: assert spec['completionMode'] == 'Indexed' and spec['backoffLimitPerIndex'] > 0

@everyone
def test_there_is_time_for_a_checkpoint(name):
    if arguments(jobs[name])[0] == 'torchrun':
        assert 60 <= int(environment(jobs[name])['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']) < pod(jobs[name])['terminationGracePeriodSeconds']

@pytest.mark.parametrize('name', ['sbldm-preprocess', 'sbldm-sample'])
def test_shards_are_a_whole(name):
    n = jobs[name]['spec']['completions']
    shards = [command(jobs[name], i)[command(jobs[name], i).index('--shard') + 1] for i in range(n)]
    assert shards == [f'{i}/{n}' for i in range(1, n + 1)] and jobs[name]['spec']['parallelism'] <= n

def options(job, index=0):
    from torch.distributed.run import get_args_parser
    return get_args_parser().parse_args(arguments(job, index)[1:])

def test_torchrun_agrees_with_the_jobs():
    vae, ldm = options(jobs['sbldm-vae']), [options(jobs['sbldm-ldm'], i) for i in range(2)]
    spec = jobs['sbldm-ldm']['spec']
    assert vae.standalone and vae.no_python and int(vae.nproc_per_node) == main(jobs['sbldm-vae'])['resources']['limits']['nvidia.com/gpu']
    for i, o in enumerate(ldm):
        assert int(o.nnodes) == spec['completions'] == spec['parallelism'] and spec['completionMode'] == 'Indexed'
        assert int(o.nproc_per_node) == main(jobs['sbldm-ldm'])['resources']['limits']['nvidia.com/gpu']
        assert o.rdzv_backend == 'c10d' and f'is_host={int(i == 0)}' in o.rdzv_conf.split(',') and o.no_python

def test_pods_meet_under_a_name_that_the_service_gives():
    job, (service,) = jobs['sbldm-ldm'], [d for d in documents if d['kind'] == 'Service']
    host, port = options(job).rdzv_endpoint.split(':')
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}" and int(port) in [p['port'] for p in service['spec']['ports']]
    assert pod(job)['subdomain'] == service['metadata']['name'] and service['spec']['clusterIP'] == 'None' and service['spec']['publishNotReadyAddresses']
    assert service['spec']['selector'].items() <= job['spec']['template']['metadata']['labels'].items()

def test_what_one_job_writes_the_next_reads():
    p, v, l, s = (command(jobs[f'sbldm-{n}']) for n in ('preprocess', 'vae', 'ldm', 'sample'))
    assert p[2] == v[1] == l[1] and l[l.index('--vae') + 1] == v[2] and s[1] == f'{l[2]}/model'

def test_no_secret_is_written_down_and_all_use_one_image_of_this_version():
    assert {main(j)['image'] for j in jobs.values()} == {f"registry.example.org/{settings()['lib_name']}:{settings()['version']}"}
    assert not [d for d in documents if d['kind'] == 'Secret']
    for job in jobs.values():
        for e in main(job).get('env', []): assert 'value' not in e or not re.search('KEY|TOKEN|SECRET|PASS', e['name'])
    assert any(e['name'] == 'SBLDM_ID_KEY' for e in main(jobs['sbldm-preprocess'])['env']), 'shards on several machines must agree on pseudonyms'

def test_the_readme_names_every_manifest():
    text = (deploy/'README.md').read_text()
    assert set(re.findall(r'[\w-]+\.yaml', text)) == set(manifests)
    assert {main(j)['image'] for j in jobs.values()} <= set(re.findall(r'registry\S+?:[\d.]+', text))
    for job in jobs: assert f'job/{job}' in text

# the command lines, run

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Folders for /source, with a few simulated people, and /workspace; our commands as pip would install them; torchrun."
    from sbldm_nb.cohort import Cohort
    at = tmp_path_factory.mktemp('pod')
    Cohort(6, spacing=4.).write(at/'source', 'brats')
    for name in ('workspace', 'home', 'bin'): (at/name).mkdir()
    scripts = dict(s.split('=') for s in settings()['console_scripts'].split())
    lines = {name: 'import sys; from {} import {} as main; sys.exit(main())'.format(*where.split(':')) for name, where in scripts.items()}
    lines['torchrun'] = 'import sys; from torch.distributed.run import main; sys.exit(main())'
    for name, line in lines.items():
        (at/'bin'/name).write_text(f'#!{sys.executable}\n{line}\n')
        (at/'bin'/name).chmod(0o755)
    return at

def start(job, at, more, index=0, line=None, **change):
    "Pod `index` of a Job as a process of this machine: its folders elsewhere, `more` words at the end of its command line."
    line = re.sub(r'(?<=\s)/(source|workspace)\b', lambda m: f'{at}/{m[1]}', line or script(job)) + ' ' + more
    env = {**os.environ, **environment(job), 'PATH': f"{at}/bin:{os.environ['PATH']}", 'PYTHONPATH': str(root), 'HOME': str(at/'home'), 'SBLDM_ID_KEY': 'a key for these tests',
           'JOB_COMPLETION_INDEX': str(index), **change}
    return subprocess.Popen(['/bin/sh', '-c', line], cwd=at, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(*pods, limit=240):
    try: said = [p.communicate(timeout=limit)[0] for p in pods]
    finally:
        for p in pods: p.terminate()                                 # not kill: torchrun ends its own processes
        for p in pods: p.wait(60)
    assert [p.returncode for p in pods] == [0] * len(pods), '\n'.join(s[-3000:] for s in said)
    return said

small = 'data.size=16,16,16 data.spacing=4 diffusion.network.channels=8,16,32'

@pytest.fixture(scope='module')
def prepared(place):
    "What the pods of the preprocessing Job leave, of volumes cut small, and an autoencoder."
    import torch
    from sbldm_nb.saving import save_vae
    from sbldm_nb.vae import AutoencoderKL
    job = jobs['sbldm-preprocess']
    finish(start(job, place, '--size 16,16,16 --workers 1', index=7))
    finish(start(job, place, '--size 16,16,16 --workers 1 --shard 1/1'))
    torch.manual_seed(0)
    save_vae(AutoencoderKL(3, channels=(8, 16)), place/'workspace'/'runs'/'vae'/'model')
    return place

def test_preprocessing_makes_what_the_preset_of_the_training_wants(prepared):
    from sbldm_nb.config import load_config
    from sbldm_nb.data import Cache
    words = command(jobs['sbldm-preprocess'])
    presets = {w[w.index('--preset') + 1] for w in (command(jobs['sbldm-vae']), command(jobs['sbldm-ldm']))}
    data = load_config(*presets).data
    assert words[words.index('--modality') + 1].split(',') == list(data.roles)
    assert tuple(map(int, words[words.index('--size') + 1].split(','))) == data.size
    assert len(Cache(prepared/'workspace'/'cache').cases()) == 6

@pytest.mark.parametrize('name', ['sbldm-vae', 'sbldm-ldm'])
def test_our_commands_take_these_lines(prepared, name):
    before = sorted((prepared/'workspace').rglob('*'))
    (said,) = finish(start(jobs[name], prepared, f'--dry_run --set {small}', line='exec ' + shlex.join(command(jobs[name]))))
    assert 'brats_multigpu' in said
    assert sorted((prepared/'workspace').rglob('*')) == before, 'a dry run writes nothing'

def free_port():
    "A port that nobody listens at, below those that the system hands out to whoever asks: it stays free until the pods meet."
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', port)): return port

def training_pods(at):
    "The Job on several machines, with two pods of one process each that meet here, for two steps."
    here = f'127.0.0.1:{free_port()}'
    steps = ' '.join(f'diffusion.training.{change}' for change in ('epochs=null', 'max_steps=2', 'workers=0', 'batch=1', 'preview_every=null'))
    return [start(jobs['sbldm-ldm'], at, f'--set {small} {steps}', index=i, GPUS='1', RENDEZVOUS=here) for i in (1, 0)]

@pytest.fixture(scope='module')
def trained(prepared):
    finish(*training_pods(prepared))
    return prepared

def test_two_pods_train_and_a_third_samples(trained):
    run = trained/'workspace'/'runs'/'ldm'
    assert list((run/'model').glob('*.safetensors')) and (run/'checkpoints').is_dir() and (run/'config.yaml').is_file()
    finish(start(jobs['sbldm-sample'], trained, '--n 8 --steps 2', index=7))
    assert [p.name for p in (trained/'workspace'/'samples').glob('simulated_*.nii.gz')] == ['simulated_0007.nii.gz']

@pytest.mark.slow
def test_a_job_that_is_started_again_has_nothing_left_to_do(trained):
    model = trained/'workspace'/'runs'/'ldm'/'model'
    weights = {p.name: p.read_bytes() for p in model.glob('*.safetensors')}
    finish(*training_pods(trained))
    assert {p.name: p.read_bytes() for p in model.glob('*.safetensors')} == weights

def lines_of_the_page():
    "The shell lines of the page on scaling out and of deploy/README.md, comments dropped, continued lines joined."
    cells = json.loads((root/'nbs'/'tutorials'/'scaling_out.ipynb').read_text())['cells']
    text = '\n'.join([''.join(c['source']) for c in cells if c['cell_type'] == 'markdown'] + [(deploy/'README.md').read_text()])
    for block in re.findall(r'```sh\n(.*?)```', text, flags=re.S):
        yield from (shlex.split(line, comments=True) for line in block.replace('\\\n', ' ').splitlines())

def test_launchers_take_the_lines_of_the_page():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    ours = [s.split('=')[0] for s in settings()['console_scripts'].split()]
    launched = []
    for words in filter(None, lines_of_the_page()):
        if 'torchrun' in words: o = get_args_parser().parse_args(words[words.index('torchrun') + 1:])
        elif words[0] == 'accelerate': o = launch_command_parser().parse_args(words[2:])
        else: o = None
        if o: launched.append(o.training_script); assert o.no_python
        assert all(w in ours for w in words if w.startswith('sbldm_') and w != 'sbldm_nb'), words
    assert len(launched) >= 4 and set(launched) <= set(ours)
