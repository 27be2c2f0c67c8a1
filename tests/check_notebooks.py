"Fail unless every notebook keeps the rules a renderer, a reader and a reviewer rely on."
import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import yaml

root = Path(__file__).resolve().parent.parent
kb = 1024
notebook_kb, story_kb, picture_kb = 300, 1024, 60
cell_lines, module_lines = 40, 60
unexecuted = {'slow', 'cuda', 'notest', 'eval:', 'hide'}
forbidden = {r'^\s*%pip': 'install with !pip, documentation builds drop lines that start with %',
             r'^@patch': 'write classes whole, without @patch',
             r'nbdev_export\(': 'no export from inside a page',
             r'test_fail\(\s*lambda \w': 'test_fail(lambda x: ...) always passes',
             r'\.cuda\(\)': 'device follows the input, no .cuda()',
             r'/(home|Users|root)/\w': "a path of someone's machine"}

def directives(source: str) -> set:
    "The names of a cell's `#|` directives."
    return set(re.findall(r'^#\|\s*(\S+)', source, re.M))

def statements(source: str) -> list:
    "The cell's top-level statements; a shell or magic line counts as `pass`, and none stands at the top level."
    plain = re.sub(r'^([ \t]*)[!%].*$', r'\1pass', source, flags=re.M)
    return [node for node in ast.parse(plain).body if not isinstance(node, ast.Pass)]

def is_import(node: ast.AST) -> bool:
    "An import, or an `if` or `try` that holds nothing else."
    if isinstance(node, (ast.If, ast.Try)): return all(isinstance(n, ast.Pass) or is_import(n) for n in node.body + node.orelse)
    return isinstance(node, (ast.Import, ast.ImportFrom))

def code_lines(source: str) -> int:
    "Lines that are neither blank nor a directive."
    return sum(bool(line.strip()) and not line.startswith('#|') for line in source.splitlines())

def is_module(nodes: list) -> bool:
    "One class and nothing else, derived from nn.Module."
    return len(nodes) == 1 and isinstance(nodes[0], ast.ClassDef) and any(ast.unparse(b).endswith('Module') for b in nodes[0].bases)

def number(name: str) -> str:
    "Where a notebook stands in the order: '00a0_anatomy' is '00a0_', which is before '00a_', because a page with one digit more is a part of the page it prepares."
    return re.match(r'\d+([a-z]\d*)?_', name)[0]

def imported(nodes: list) -> list:
    "The (module, names) that a cell takes from the package, in functions too."
    return [(node.module.split('.')[1], [a.name for a in node.names]) for top in nodes for node in ast.walk(top)
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('sbldm_nb.')]

def shows(node: ast.AST) -> bool:
    "A top-level call that always leaves an output."
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ('print', 'plt.show')

def check_code(cell: dict, name: str, order: dict) -> list:
    "What is wrong with one code cell."
    source, flags = cell.source, directives(cell.source)
    found = [why for pattern, why in forbidden.items() if re.search(pattern, source, re.M)]
    try: nodes = statements(source)
    except SyntaxError as error: return [*found, f'does not parse: {error}']
    exported = bool(flags & {'export', 'exports', 'exporti'})
    if any(map(is_import, nodes)) and not all(map(is_import, nodes)): found.append('imports and other code in one cell')
    limit = module_lines if is_module(nodes) else cell_lines
    if exported and code_lines(source) > limit: found.append(f'exported cell of {code_lines(source)} lines, at most {limit}')
    for module, names in imported(nodes):
        if exported and '*' in names: found.append(f'import * from {module} in an exported cell')
        if name in order and not order.get(module, '') < order[name]: found.append(f'imports {module}, which does not come before it')
    if any(map(shows, nodes)) and not cell.outputs and not flags & unexecuted: found.append('not executed: it should have an output')
    return found

def check_outputs(cell: dict) -> list:
    "What is wrong with the outputs of one code cell."
    found = []
    for output in cell.outputs:
        png = output.get('data', {}).get('image/png', '')
        if len(png)*3//4 > picture_kb*kb: found.append(f'picture of {len(png)*3//4//kb} KB, at most {picture_kb}')
        if output.output_type == 'error': found.append('an error among its outputs')
        if output.get('name') == 'stderr': found.append('a warning among its outputs')
        if re.search(r'/(home|Users|root|tmp)/\w', str(output.get('text', '')) + str(output.get('data', {}).get('text/plain', ''))):
            found.append('a path of this machine among its outputs')
    return found

def check_head(nb: dict, name: str) -> list:
    "What is wrong with the opening: `# Title`, a `> promise`, `#| default_exp` in the first code cell of a page that exports."
    prose = [c.source for c in nb.cells if c.cell_type == 'markdown']
    code = [c.source for c in nb.cells if c.cell_type == 'code']
    found = [] if prose and re.match(r'# .+\n+> .+', prose[0]) else ['does not open with # Title and > promise']
    exports = any(re.search(r'^#\|\s*exports?\b', c, re.M) for c in code)
    if exports and not re.search(r'^#\|\s*default_exp \w+', code[0], re.M):
        found.append('the first code cell has no #| default_exp')
    return found

def check(path: Path, order: dict) -> list:
    "What is wrong with the notebook at `path`, one sentence each; `order` maps module names to places."
    raw = json.loads(path.read_text(encoding='utf-8'))
    if (raw['nbformat'], raw['nbformat_minor']) != (4, 5): return [f"nbformat {raw['nbformat']}.{raw['nbformat_minor']}, wanted 4.5"]
    name = next((key for key in order if re.fullmatch(rf'\d+([a-z]\d*)?_{key}', path.stem)), '')
    limit, size = story_kb if path.stem.startswith('08_') else notebook_kb, path.stat().st_size//kb
    found = [f'{size} KB, at most {limit}'] if size > limit else []
    ids = [cell.get('id') for cell in raw['cells']]
    if None in ids or len(set(ids)) != len(ids): return [*found, 'cell ids are missing or not unique']  # nbformat would mend them in silence
    nb = nbformat.read(path, as_version=4)
    if 'widgets' in nb.metadata: found.append('saved widget state')
    found += check_head(nb, path.stem)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == 'code': found += [f'cell {i}: {why}' for why in check_code(cell, name, order) + check_outputs(cell)]
    if name and not any(cell.get('outputs') for cell in nb.cells): found.append('no cell has an output: execute it before committing')
    return found

def sidebar(node) -> list:
    "Every page the sidebar of _quarto.yml lists, in order."
    if isinstance(node, str): return [node]
    return [page for item in (node if isinstance(node, list) else node.get('contents', [])) for page in sidebar(item)]

def check_all(nbs: Path) -> list:
    "What is wrong with the notebooks in the folder `nbs` and with the sidebar beside them."
    paths = sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    order = {p.stem.split('_', 1)[1]: number(p.stem) for p in paths if re.match(r'\d+([a-z]\d*)?_', p.stem)}
    pages = sidebar(yaml.safe_load((nbs/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'])
    have = [str(p.relative_to(nbs)) for p in paths]
    found = [f'_quarto.yml: lists {page}, which is not there' for page in pages if page not in have]
    found += [f'_quarto.yml: {page} is missing from the sidebar' for page in have if page not in pages]
    return found + [f'{path.name}: {why}' for path in paths for why in check(path, order)]

if __name__ == '__main__':
    problems = check_all(root/'nbs')
    if problems: sys.exit('\n'.join(['Notebooks break rules:', *problems]))
    print('notebooks: all rules kept')
