"Write constraints.txt: one tested version of every package that any extra installs, for each supported Python. Needs `pip install uv`."
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
pythons = ['3.10', '3.11', '3.12', '3.13']
systems = [('linux', 'Linux', 'posix'), ('darwin', 'Darwin', 'posix'), ('win32', 'Windows', 'nt')]
torch = '2.13.0'
builds = re.compile(r'nvidia-|cuda-|triton')  # what a CUDA build of torch brings along; it pins these itself
head = f'''# Versions that `make test` passed with. Made by scripts/make_constraints.py; pins already here are kept while they resolve.
# Only for development, the demo and CI: the requirements in settings.ini are loose lower bounds.
'''

def compiled(requirements: list) -> list:
    "The resolution of `requirements` that holds for every Python, starting from the pins in constraints.txt."
    with tempfile.TemporaryDirectory() as tmp:
        source, out = Path(tmp)/'requirements.in', Path(tmp)/'constraints.txt'
        source.write_text('\n'.join(requirements))
        if (old := root/'constraints.txt').exists(): out.write_text(old.read_text())
        subprocess.run([sys.executable, '-m', 'uv', 'pip', 'compile', source, '--universal', '--python-version', pythons[0], '-o', out,
                        '--no-annotate', '--no-header', '--quiet'], check=True)
        return [Requirement(line) for line in out.read_text().splitlines() if line]

def version_on(pins: list, python: str) -> str:
    "The version `pins` of one package ask for with CPython `python` on Linux, macOS or Windows, or '' if none does."
    for sys_platform, platform_system, os_name in systems:
        env = dict(python_version=python, python_full_version=python + '.0', sys_platform=sys_platform, os_name=os_name,
                   platform_system=platform_system, platform_machine='x86_64', implementation_name='cpython')
        for pin in pins:
            if pin.marker is None or pin.marker.evaluate(env): return str(pin.specifier)
    return ''

def lines(name: str, pins: list) -> list:
    "The lines of constraints.txt for one package: one without a marker, or one for each run of Pythons with the same version."
    runs = []
    for python in pythons:
        version = version_on(pins, python)
        if runs and runs[-1][0] == version: runs[-1][2] = python
        else: runs.append([version, python, python])
    runs = [run for run in runs if run[0]]
    if len(runs) == 1: return [f'{name}{runs[0][0]}']
    def marker(first, last):
        low = f"python_version >= '{first}'" if first != pythons[0] else ''
        high = f"python_version <= '{last}'" if last != pythons[-1] else ''
        return ' and '.join(filter(None, [low, high]))
    return [f'{name}{version} ; {marker(first, last)}' for version, first, last in runs]

config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
packages = {}
wanted = [requirement for key, value in cfg.items() if key.endswith('requirements') for requirement in value.split()]
for pin in compiled(wanted + [f'torch=={torch}']):
    if not builds.match(pin.name): packages.setdefault(pin.name, []).append(pin)
text = [line for name in sorted(packages) for line in lines(name, packages[name])]
(root/'constraints.txt').write_text(head + '\n'.join(text) + '\n')
