"Rules of the house: what is source, what points where, what may be stored."
import ast, json, os, re, subprocess
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
NUMBERED = sorted((p for p in NOTEBOOKS if p.name[0].isdigit()), key=lambda p: (p.stem.startswith('07'), p.name)) # in the order of imports: the commands, which call the paper too, come last
by_name = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)

def cells(path, kind='code'): return [c for c in json.loads(path.read_text())['cells'] if c['cell_type']==kind]
def source(cell): return ''.join(cell['source'])
def directives(cell): return re.findall(r'^#\| *(.+?) *$', source(cell), re.M)
def code(path): return '\n'.join('\n'.join(l for l in source(c).splitlines() if not l.startswith('%')) for c in cells(path))
def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini')
    return parser['DEFAULT']

# ---- imports

def imported(path):
    "Modules of this package that a notebook imports."
    names = set()
    for node in ast.walk(ast.parse(code(path))):
        found = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names |= {m.removeprefix('ssl_wikichurches.') for m in found if m and m.startswith('ssl_wikichurches.')}
    return names

def defined(path): return re.findall(r'^#\| *default_exp:? *(\S+)', code(path), re.M)

def test_imports_point_backwards():
    seen = set()
    for p in NUMBERED:
        assert not (late := imported(p)-seen), f"{p.name} imports {sorted(late)}, which a later notebook defines"
        seen |= set(defined(p))
    package = ROOT/'ssl_wikichurches'
    assert {'.'.join(p.relative_to(package).with_suffix('').parts) for p in package.rglob('[a-z]*.py')}==seen # every module has a notebook
    assert imported(ROOT/'nbs'/'index.ipynb')<=seen

WINGS = {'00':'data', '01':'backbones', '02':'attention', '03':'finetune', '04':'finetune', '05':'stats', '06':'study', '90':'study', '07':'cli'}
LINE = ('00_data','01_backbones','02_attention','03_finetune_linear','03_finetune_lora','03_finetune_full','04_attn_supervised','05_iou_stats')

def test_the_number_of_a_notebook_is_its_wing():
    for p in NUMBERED: assert [d.split('.')[0] for d in defined(p)]==[WINGS[p.stem[:2]]], p.name
    assert {*LINE}<={p.stem for p in NUMBERED}
    letters = [re.match(r'\d\d[A-Za-z](?=_)', p.stem) for p in NUMBERED if p.stem not in (*LINE,'07_cli','90_paper')]
    assert all(letters) and len({m[0].lower() for m in letters})==len(letters), 'every side room has a letter of its own'

def test_wings_stand_in_line():
    "A module imports from its own wing and from those before it."
    order = list(dict.fromkeys(WINGS.values()))
    for p in (ROOT/'ssl_wikichurches').rglob('[a-z]*.py'):
        here = p.relative_to(ROOT/'ssl_wikichurches').with_suffix('').parts
        for node in ast.walk(ast.parse(p.read_text())):
            if not (isinstance(node, ast.ImportFrom) and node.level): continue
            base = here[:len(here)-node.level]
            wing = (*base,*(node.module or '').split('.'))[0]
            assert order.index(wing)<=order.index(here[0]), f"{'.'.join(here)} imports {wing}, which stands after it"

@by_name
def test_imports_are_absolute_named_and_apart(path):
    for c in cells(path):
        body = ast.parse(source(c)).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        for n in imports: assert not (isinstance(n, ast.ImportFrom) and (n.level or n.names[0].name=='*')), source(c)
        if imports and 'nbdev_export' not in source(c): assert len(imports)==len(body), f'{path.name}: imports and code in one cell:\n{source(c)}'

# ---- notebooks

@by_name
def test_anatomy(path):
    all_cells = json.loads(path.read_text())['cells']
    assert source(all_cells[0]).startswith('# ') and '\n> ' in source(all_cells[0])
    assert len(defined(path))==(path in NUMBERED)
    if path in NUMBERED: assert source(cells(path)[-1])=='#| hide\nimport nbdev; nbdev.nbdev_export()'
    for c in cells(path):
        lines = source(c).splitlines()
        first = next((i for i,l in enumerate(lines) if not l.startswith('#|')), len(lines))
        assert not any(l.startswith('#|') for l in lines[first:]), f'directives come first:\n{source(c)}'
        assert 'eval: false' not in directives(c)

@by_name
def test_stored_outputs_are_small_whole_and_of_no_machine(path):
    assert path.stat().st_size<1_000_000
    for c in cells(path):
        text = json.dumps(c['outputs'])
        assert not re.search(r'/(home|root|tmp|work|Users)/', text), f'{path.name}: the path of a machine in the output of\n{source(c)}'
        assert not re.search(r'Traceback|Warning:|\d+%\|', text), f'{path.name}: a warning or a progress bar in the output of\n{source(c)}'
        for o in c['outputs']:
            assert o['output_type']!='error' and o.get('name')!='stderr', source(c)
            for kind,data in o.get('data', {}).items():
                assert len(data)<140_000 if kind.startswith('image/') else True, f'{path.name}: a picture of {len(data)} bytes'
    quiet = [source(c) for c in cells(path) if not c['outputs'] and c['metadata'].get('execution') is None]
    assert len(quiet)<len(cells(path)), f'{path.name} was not executed'

@by_name
def test_exported_functions_say_what_they_take(path):
    "A public function has a docstring, and every parameter of it a type or a comment."
    for c in cells(path):
        if not any(d.startswith('export') for d in directives(c)): continue
        for node in ast.parse(source(c)).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith('_'): continue
            args = [a for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs] if a.arg not in ('self','cls')]
            missing = [a.arg for a in args if a.annotation is None and not _commented(source(c), a.arg)]
            assert not missing and ast.get_docstring(node), f'{path.name}: {node.name} lacks annotations of {missing} or a docstring'

def _commented(text, name): return re.search(rf'^ *{name}\b.*#', text, re.M)

# ---- generated files and metadata

def test_setup_reads_settings():
    out = subprocess.run(['python', 'setup.py', '--name', '--version', '--license'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert out[-3:]==[settings()['lib_name'], settings()['version'], 'Apache-2.0']

def test_every_command_is_installed():
    from importlib.metadata import entry_points
    named = dict(c.split('=') for c in settings()['console_scripts'].split())
    found = {e.name:e.value for e in entry_points(group='console_scripts') if e.name in named}
    assert found==named
    for e in entry_points(group='console_scripts'):
        if e.name in named: assert callable(e.load())

def test_citation_agrees_with_settings():
    c = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert c['version']==settings()['version'] and c['license']=='Apache-2.0'
    assert c['repository-code']=='https://github.com/'+settings()['user']+'/'+settings()['repo']

def commands(text): return [l.split('#')[0].strip() for block in re.findall(r'```sh\n(.*?)```', text, re.S) for l in block.splitlines()]

def test_readme_index_makefile_and_ci_say_the_same():
    readme = commands((ROOT/'README.md').read_text())
    index = commands('\n'.join(source(c) for c in cells(ROOT/'nbs'/'index.ipynb', 'markdown')))
    assert readme==index and len(readme)>=7
    makefile,ci = (ROOT/'Makefile').read_text(), (ROOT/'.ci'/'run').read_text()
    assert "pip install -e '.[dev]'" in readme and all("install -e '.[dev]'" in t for t in (makefile, ci))
    for part in ('nbdev_test --n_workers 2', 'pytest -q -n 2 --dist loadfile tests'):
        assert part in ' '.join(readme) and part in makefile
    assert 'nbdev_test --n_workers 2' in ci and re.search(r'pytest -q -n 2.* tests', ci)

def test_links_of_the_readme_and_its_neighbors():
    for name in ('README.md','CONTRIBUTING.md'):
        for target in re.findall(r'\]\(([^)#]+)\)', (ROOT/name).read_text()):
            if not target.startswith('http'): assert (ROOT/target).exists(), f'{name}: {target}'

def test_no_machine_and_no_secret_in_any_file():
    files = subprocess.run(['git','ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split('\n')
    for f in filter(None, files):
        p = ROOT/f
        if p.is_symlink() or p.suffix in ('.png','.jpg','.safetensors') or f.startswith('tests/test_house'): continue
        assert not re.search(r'/root/|/work/main|/home/\w+/', p.read_text(encoding='utf-8')), f
