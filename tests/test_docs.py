"Every page can be processed for the documentation site: what nbdev does before it hands the pages to Quarto."
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
script = '''
from nbdev.serve import proc_nbs
if __name__ == '__main__': proc_nbs(n_workers=2, force=True)
'''

def test_pages_process_for_the_site(tmp_path):
    for name in ('settings.ini', '_quarto.yml'): shutil.copy2(root/name, tmp_path/name)
    for name in ('nbs', 'sbldm_nb'):
        shutil.copytree(root/name, tmp_path/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    (tmp_path/'process.py').write_text(script)
    done = subprocess.run([sys.executable, 'process.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in (root/'nbs').glob('*.ipynb'):
        made = nbformat.read(tmp_path/'_proc'/page.name, as_version=4)
        assert made.cells[0].cell_type == 'raw' and 'title:' in made.cells[0].source, page.name
        documented = ''.join(cell.source for cell in made.cells if cell.cell_type == 'code')
        assert '#| export' not in page.read_text() or 'show_doc(' in documented or '#| exports' in page.read_text(), page.name
