"Write README.md from nbs/index.ipynb: prose and code as they stand, `#| hide` cells left out, links and pictures seen from the top folder."
import base64
import posixpath
import re
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by scripts/make_readme.py (make sync). Edit the notebook. -->'
markdown_link = re.compile(r'(\]\()([^)\s]+)')
html_link = re.compile(r'((?:src|href)=")([^"]+)')

def from_top(match: re.Match) -> str:
    "A relative link of the notebook as it reads from the top folder."
    start, target = match.groups()
    if re.match(r'[a-z]+:|#|/', target): return match[0]
    return start + posixpath.normpath(posixpath.join('nbs', target))

def shown(output: dict, pictures: dict) -> str:
    "One output as markdown; a picture is added to `pictures`, file name to bytes."
    data = output.get('data', {})
    if png := data.get('image/png'):
        name = f'index_files/figure-{len(pictures) + 1}.png'
        pictures[name] = base64.b64decode(png)
        return f'![]({name})'
    if text := data.get('text/markdown'): return text
    text = output.get('text') or data.get('text/plain', '')
    return f'```\n{text.rstrip()}\n```' if text.strip() else ''

def rendered(notebook: Path) -> tuple:
    "The notebook as (markdown, pictures)."
    parts, pictures = [note], {}
    for cell in nbformat.read(notebook, 4).cells:
        directives = re.findall(r'^#\|\s*(\S+)', cell.source, re.M) if cell.cell_type == 'code' else []
        source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip() if directives else cell.source.strip()
        if 'hide' in directives or not source: continue
        if cell.cell_type == 'markdown': parts.append(html_link.sub(from_top, markdown_link.sub(from_top, source)))
        elif cell.cell_type == 'code':
            parts += [f'```python\n{source}\n```', *filter(None, (shown(output, pictures) for output in cell.outputs))]
    return '\n\n'.join(parts) + '\n', pictures

if __name__ == '__main__':
    text, pictures = rendered(root/'nbs'/'index.ipynb')
    (root/'README.md').write_text(text, encoding='utf-8')
    for name, png in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(png)
