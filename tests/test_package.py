"What a user installs: requirements, constraints, sdist, wheel, and what importing the package pulls in."
import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).resolve().parent.parent
frame = ['setup.py', 'pyproject.toml', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'NOTICE', 'CHANGELOG.md', 'CONTRIBUTING.md', 'constraints.txt']
pythons = ['3.10', '3.11', '3.12', '3.13']
modules = sorted(p.stem for p in (root/'sbldm_nb').glob('*.py') if not p.stem.startswith('_'))

def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def python(*args, cwd, **kwargs):
    "Run this Python and return what it printed; its errors are the test's."
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "An sdist, and the wheel made from that sdist, of a copy of the tree."
    tree, out = tmp_path_factory.mktemp('tree'), tmp_path_factory.mktemp('dist')
    for name in frame: shutil.copy2(root/name, tree/name)
    for folder in ('sbldm_nb', 'nbs', 'tests', 'scripts'):
        shutil.copytree(root/folder, tree/folder, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    python('-m', 'build', '--no-isolation', '--outdir', out, tree, cwd=out)
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))

def test_sdist_can_be_installed_from(built):
    with tarfile.open(built[0]) as sdist: names = {name.split('/', 1)[-1] for name in sdist.getnames()}
    assert set(frame) <= names
    assert {f'sbldm_nb/{module}.py' for module in modules} <= names
    assert not [name for name in names if name.endswith(('.ipynb', '.pyc')) or name.startswith(('nbs/', 'tests/'))]

def test_wheel_holds_code_assets_and_licences_only(built):
    with zipfile.ZipFile(built[1]) as wheel: names = set(wheel.namelist())
    code = {name for name in names if '.dist-info/' not in name}
    assert code == {str(path.relative_to(root)) for path in (root/'sbldm_nb').rglob('*')
                    if path.is_file() and (path.suffix == '.py' or 'assets' in path.parts)}
    assert {'LICENSE', 'NOTICE'} <= {name.rsplit('/', 1)[-1] for name in names}
    assert built[1].stat().st_size < 4 * 2**20

def test_every_requirements_key_is_an_extra(built):
    with zipfile.ZipFile(built[1]) as wheel:
        text = wheel.read(next(name for name in wheel.namelist() if name.endswith('METADATA'))).decode()
    required = [line.split(': ', 1)[1] for line in text.splitlines() if line.startswith('Requires-Dist: ')]
    extras = {line.split(': ', 1)[1] for line in text.splitlines() if line.startswith('Provides-Extra: ')}
    cfg = settings()
    assert extras == {key[:-len('_requirements')] for key in cfg if key.endswith('_requirements')}
    always = {Requirement(r).name for r in required if 'extra ==' not in r}
    assert always == {Requirement(r).name for r in cfg['requirements'].split()}
    assert f"Requires-Python: >={cfg['min_python']}" in text and f"Version: {cfg['version']}" in text

def test_wheel_runs_from_another_folder(built, tmp_path):
    python('-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', '--target', tmp_path/'site', built[1], cwd=tmp_path)
    code = ("import sys; sys.path.insert(0, 'site'); import sbldm_nb, importlib.resources as r; print(sbldm_nb.__file__);"
            "print(sbldm_nb.__version__); print(sorted(p.name for p in r.files('sbldm_nb').joinpath('assets').iterdir()))")
    file, version, assets = python('-c', code, cwd=tmp_path).splitlines()
    assert str(tmp_path) in file and version == settings()['version']
    assert assets == str(sorted(p.name for p in (root/'sbldm_nb'/'assets').iterdir()))

def test_console_scripts_exist():
    for entry in settings()['console_scripts'].split():
        module, function = entry.split('=')[1].split(':')
        tree = ast.parse((root/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, entry

def test_run_time_needs_no_development_package(tmp_path):
    code = f"import importlib, sys; [importlib.import_module('sbldm_nb.' + m) for m in {modules}]; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = set(python('-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)}).split())
    assert 'torch' in loaded
    assert not loaded & {'nbdev', 'execnb', 'ghapi', 'pytest', 'nbconvert', 'monai', 'diffusers', 'torchmetrics', 'nilearn', 'pkg_resources'}

def test_every_import_is_declared():
    declared = {canonicalize_name(Requirement(r).name) for r in settings()['requirements'].split()}
    owners = packages_distributions()
    for module in modules:
        tree = ast.parse((root/'sbldm_nb'/f'{module}.py').read_text(encoding='utf-8'))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
        for top in {name.split('.')[0] for name in names} - set(sys.stdlib_module_names) - {'sbldm_nb'}:
            assert declared & {canonicalize_name(owner) for owner in owners.get(top, [top])}, f'{module} imports {top}, which settings.ini does not require'

@pytest.mark.parametrize('version', pythons)
def test_constraints_pin_each_requirement_once(version):
    env = dict(python_version=version, python_full_version=version + '.0')
    pins = {}
    for line in (root/'constraints.txt').read_text().splitlines():
        if line.startswith('#'): continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(env):
            assert pin.name not in pins, f'{pin.name} is pinned twice for Python {version}'
            pins[pin.name] = str(pin.specifier).removeprefix('==')
    assert pins['torch'] == '2.13.0'
    cfg = settings()
    for text in cfg['requirements'].split() + cfg['dev_requirements'].split():
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate(env): assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), (text, version)

def test_run_time_requirements_are_lower_bounds():
    for text in settings()['requirements'].split():
        assert {s.operator for s in Requirement(text).specifier} == {'>='}, f'{text} is more than a lower bound'

def test_pages_leave_nothing_behind():
    left = [str(p.relative_to(root)) for p in (root/'nbs').rglob('*') if p.is_file() and '.ipynb_checkpoints' not in p.parts
            and p.suffix not in ('.ipynb', '.yml', '.css') and 'images' not in p.parts]
    assert not left
