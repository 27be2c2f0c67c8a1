"The checks of `make test` must be able to fail: each is given what it is there to find."
import base64
import shutil
from pathlib import Path

import check_notebooks
import check_sync
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

root = Path(__file__).resolve().parent.parent
head = [new_markdown_cell('# Title\n\n> Promise.'), new_code_cell('#| default_exp thing')]
order = {'early': (0, ''), 'thing': (1, ''), 'thing_after': (1, 'a')}

def page(tmp_path, *cells, name='01_thing', minor=5):
    "A small notebook that keeps every rule, followed by `cells`."
    good = new_code_cell('print(1)', outputs=[new_output('stream', text='1\n')])
    nb = new_notebook(cells=[*map(nbformat.from_dict, head), good, *cells], nbformat_minor=minor)
    nbformat.write(nb, path := tmp_path/f'{name}.ipynb')
    return path

def long_function(n): return '#| export\ndef f():\n' + '    x = 1\n' * (n - 1)
def long_class(n, base): return f'#| export\nclass A({base}):\n' + '    x = 1\n' * (n - 1)

@pytest.mark.parametrize('source', ['#| export\nimport os\nfrom sbldm_nb.early import a', long_function(40), long_class(60, 'nn.Module'),
                                    '#| slow\nprint(2)', '!pip install -q thing', 'if 1:\n    !pip install -q thing', 'try: import a\nexcept ImportError: pass'])
def test_what_keeps_the_rules_passes(tmp_path, source):
    assert check_notebooks.check(page(tmp_path, new_code_cell(source)), order) == []

@pytest.mark.parametrize('source, why', [
    ('import os\nx = 1', 'imports and other code'), (long_function(41), 'exported cell of 41'), (long_class(41, 'dict'), 'exported cell of 41'),
    (long_class(61, 'nn.Module'), 'exported cell of 61'), ('from sbldm_nb.thing_after import a', 'does not come before'),
    ('def f():\n    from sbldm_nb.thing_after import a', 'does not come before'), ('#| export\nfrom sbldm_nb.early import *', 'import *'),
    ('print(2)', 'not executed'), ('%pip install thing', '!pip'), ('test_fail(lambda x: 1)', 'always passes'), ('x = (', 'does not parse'),
    ('@patch\ndef f(self): ...', '@patch'), ("open('/home/someone/x')", "someone's machine")])
def test_what_breaks_a_rule_is_named(tmp_path, source, why):
    found = check_notebooks.check(page(tmp_path, new_code_cell(source)), order)
    assert len(found) == 1 and why in found[0], found

def test_outputs_are_checked(tmp_path):
    big = base64.b64encode(b'x' * 61 * 1024).decode()
    outputs = [new_output('display_data', data={'image/png': big}), new_output('error', ename='E', evalue='', traceback=[]),
               new_output('stream', text='/tmp/x'), new_output('stream', name='stderr', text='old')]
    found = check_notebooks.check(page(tmp_path, new_code_cell('f()', outputs=outputs)), order)
    assert [any(why in line for line in found) for why in ('picture of 61 KB', 'an error', 'a path', 'a warning')] == [True] * 4

def test_ids_size_and_format_are_checked(tmp_path):
    path = page(tmp_path, new_code_cell('x = 1', id='first'), new_code_cell('y = 1', id='second'))
    path.write_text(path.read_text().replace('"second"', '"first"'))
    assert check_notebooks.check(path, order) == ['cell ids are missing or not unique']
    assert 'at most 300' in check_notebooks.check(page(tmp_path, new_markdown_cell('x' * 310_000)), order)[0]
    assert check_notebooks.check(page(tmp_path, new_markdown_cell('x' * 310_000), name='08_thing'), order) == []
    path = page(tmp_path)
    path.write_text(path.read_text().replace('"nbformat_minor": 5', '"nbformat_minor": 4'))
    assert check_notebooks.check(path, order) == ['nbformat 4.4, wanted 4.5']

def test_sidebar_lists_every_page(tmp_path):
    page(tmp_path, name='01_thing')
    (tmp_path/'_quarto.yml').write_text('website: {sidebar: {contents: [index.ipynb, {section: A, contents: [00_early.ipynb]}]}}')
    found = check_notebooks.check_all(tmp_path)
    assert [line for line in found if 'sidebar' in line] == ['_quarto.yml: 01_thing.ipynb is missing from the sidebar']
    assert sum('which is not there' in line for line in found) == 2

def test_sync_names_what_was_edited_by_hand(tmp_path):
    check_sync.copied(root, tmp_path)
    module = sorted((tmp_path/'sbldm_nb').glob('[a-z]*.py'))[0]
    module.write_text(module.read_text() + '\nx = 1\n')
    shutil.copy(module, tmp_path/'sbldm_nb'/'orphan.py')
    (tmp_path/'README.md').write_text('stale')
    found = check_sync.differences(tmp_path)
    assert {line.split(':')[0] for line in found} == {f'sbldm_nb/{module.name}', 'sbldm_nb/orphan.py', 'README.md'}
