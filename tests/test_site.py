"The site up to Quarto, which only warns of what is dead: navigation, links and cross-references."
import ast, importlib, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import pandas as pd, pytest, yaml
from ssl_wikichurches.study.pages import _comments, _public, say_usual

ROOT = Path(__file__).parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))
QUARTO = yaml.safe_load((NBS/'_quarto.yml').read_text())
OURS = re.compile(r'https://github\.com/ssl-wikichurches/ssl_wikichurches/(?:blob|tree)/main/([^#]+)') # a file of this repository

def leaves(contents):
    for c in contents:
        if isinstance(c, str): yield c
        else: yield from leaves(c['contents'])

LINE = ['00_data','01_backbones','02_attention','03_finetune_linear','03_finetune_lora','03_finetune_full','04_attn_supervised','05_iou_stats']

def wrong_navigation(site, made):
    "Pages that the sidebar lacks or has twice, links of the menus that lead nowhere, and whether reading does not begin with the line through the house. `made`: the finished site."
    listed = [*leaves(site['sidebar']['contents'])]
    pages = [p.name for p in (*NOTEBOOKS, *NBS.glob('*.qmd')) if p.name!='404.qmd']
    wrong = sorted({p for p in listed+pages if listed.count(p)!=1 or p not in pages})
    items = [i for item in site['navbar']['left']+site['navbar']['right'] for i in (item['menu'] if 'menu' in item else [item])]
    for href in (i['href'] for i in items):
        page,_,anchor = href.partition('#')
        if own := OURS.match(href): wrong += [href]*(not (ROOT/own[1]).exists())
        elif href.startswith('http'): continue
        elif anchor and page.endswith('.ipynb'): wrong.append(href) # Quarto finds no notebook of such a name
        elif (page := page.replace('index.html', 'index.ipynb') if anchor else page).endswith('.html'): wrong += [href]*(not (made/page).is_file())
        elif not (NBS/page).is_file() or anchor and anchor not in anchors((NBS/page).read_text() if page.endswith('.qmd') else md_of(NBS/page)): wrong.append(href)
    first = [n for n in listed if n!='demonstration.qmd'][:9]
    return wrong+['order of reading']*(first!=['index.ipynb',*(f'{n}.ipynb' for n in LINE)])

def test_navigation_lists_every_page_once(processed): assert not wrong_navigation(QUARTO['website'], processed/'_docs')

def test_the_front_page_leads_to_every_notebook():
    text = md_of(NBS/'index.ipynb')
    assert not (lost:=[p.name for p in NOTEBOOKS if f']({p.name}' not in text and p.stem!='index']), f'no link to {lost} on the front page'

def test_a_wrong_navigation_would_be_found(processed):
    site = yaml.safe_load((NBS/'_quarto.yml').read_text())['website']
    _,_,line,data,*_ = site['sidebar']['contents']
    line['contents'].append(line['contents'].pop(0))
    data['contents'].remove('00A_files.ipynb')
    for item,href in zip(site['navbar']['left'][1]['menu'], bad := ['index.html#nowhere', 'demo/gone.html', 'https://github.com/ssl-wikichurches/ssl_wikichurches/tree/main/gone']): item['href'] = href
    assert wrong_navigation(site, processed/'_docs')==['00A_files.ipynb', *bad, 'order of reading']

def test_files_of_the_configuration():
    assert not (NBS/'_quarto.yml').is_symlink() and not (ROOT/'_quarto.yml').exists() # a symlink is a text file in a checkout on Windows
    site = QUARTO
    named = [t for themes in site['format']['html']['theme'].values() for t in themes if t.endswith('css')]+[site['bibliography'], site['website']['favicon'], '404.qmd']
    assert all((NBS/t).is_file() for t in named)

def test_pages_have_the_colors_of_the_figures():
    from ssl_wikichurches.study.figures import PAGE_COLORS
    for name,i in (('styles.scss', 0), ('dark.scss', 1)):
        used = {c.upper() for c in re.findall(r'#[0-9A-Fa-f]{6}', (NBS/name).read_text())}
        assert used and used<={v[i].upper() for v in PAGE_COLORS.values()}|{'#FFFFFF'}, name

def anchors(text):
    "Ids that Quarto gives to the headings and labels of a page."
    slug = lambda h: re.sub(r'[^\w\s.-]', '', re.sub(r'[`*]', '', h).lower()).strip().replace(' ', '-')
    return {slug(h) for h in re.findall(r'^#+ +(.+?)(?: *\{.*\})?$', text, re.M)} | set(re.findall(r'\{#([\w-]+)', text))

def md_of(path): return '\n\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type']=='markdown')

def pages(folder): # page -> markdown (of cells, and of outputs such as nbdev's entries of functions) and code of it
    out = {}
    for p in sorted(folder.glob('*.ipynb')):
        d = json.loads(p.read_text())
        written = [c['source'] for c in d['cells'] if c['cell_type'] in ('markdown','raw')]
        shown = [o.get('data', {}).get('text/markdown', '') for c in d['cells'] for o in c.get('outputs', [])]
        out[p.name] = '\n\n'.join(map(''.join, written+shown)), '\n'.join(''.join(c['source']) for c in d['cells'] if c['cell_type']=='code')
    return out|{p.name:(p.read_text(),'') for p in sorted(folder.glob('*.qmd'))}

def numbered(md): return re.findall(r'^(?:.*[^ ])?\$\$ \{#(eq-[\w-]+)\}$', md, re.M) # where Quarto sees them: behind the end of a displayed equation

def dead(folder, site_url, made=None):
    "Links and cross-references of a folder of pages that lead nowhere. `made`: the finished site, for what is no page of the folder; without it, such links are not looked at."
    found,wrong = pages(folder),[]
    file_of = {re.search(r'^output-file: *(\S+)', md, re.M).group(1) if 'output-file:' in md else re.sub(r'\.(ipynb|qmd)$', '.html', n): n for n,(md,_) in found.items()}
    for name,(md,code) in found.items():
        prose = re.sub(r'```.*?```|`[^`\n]*`', '', md, flags=re.S)
        for target in re.findall(r'\]\(<?([^)\s>]+)', md)+re.findall(r'(?:href|src)="([^"]+)"', md):
            if (own := OURS.match(target)) and not (ROOT/own[1]).exists(): wrong.append((name, target))
            if target.startswith(site_url): target = target[len(site_url):].lstrip('/')
            if re.match(r'(https?|mailto|data):', target): continue
            page,_,anchor = target.partition('#')
            page = file_of.get(page.lstrip('/'), page) or name
            if page.endswith('.html'): wrong += [(name, target)]*(made is not None and not (made/page.lstrip('/')).is_file())
            elif page not in found and not (folder/page).exists(): wrong.append((name, target))
            elif anchor and page in found and anchor not in anchors(found[page][0]): wrong.append((name, target))
        labels = {*re.findall(r'^#\| *label: *(\S+)', code, re.M), *re.findall(r'\{#((?:fig|tbl|sec)-[\w-]+)', md), *numbered(md)} # of this page: those of another one are out of reach
        wrong += [(name, '@'+ref) for ref in re.findall(r'(?<![\w@])@((?:fig|tbl|sec|eq)-[\w-]+)', prose) if ref not in labels]
        wrong += [(name, 'not referred to: '+ref) for ref in re.findall(r'\{#(eq-[\w-]+)', prose) if f'@{ref}' not in prose]
    return wrong

def test_links_of_the_sources(): assert not dead(NBS, 'https://ssl-wikichurches.github.io/ssl_wikichurches')

def test_a_dead_link_would_be_found(tmp_path):
    def page(name, text): (tmp_path/name).write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source=[text])])))
    page('a.ipynb', '# A\n\n## A section\n\nSee [b](b.ipynb#there), [here](#a-section), @fig-none, [gone](gone.ipynb), [far](https://example.org)')
    page('b.ipynb', '# B\n\n## Here\n\n$$x=1$$ {#eq-one}\n\n$$x=2$$ {#eq-two}\n\n$x=3$ {#eq-three}\n\nBy @eq-one and @eq-three.')
    page('c.ipynb', '# C\n\nBy @eq-one. [Explorer](demo/index.html), [code](https://github.com/ssl-wikichurches/ssl_wikichurches/blob/main/gone.py)')
    wrong = [('a.ipynb','b.ipynb#there'), ('a.ipynb','gone.ipynb'), ('a.ipynb','@fig-none'), ('b.ipynb','@eq-three'), ('b.ipynb','not referred to: eq-two'),
             ('c.ipynb','https://github.com/ssl-wikichurches/ssl_wikichurches/blob/main/gone.py'), ('c.ipynb','@eq-one')]
    assert dead(tmp_path, 'https://site')==wrong
    assert dead(tmp_path, 'https://site', tmp_path)==wrong[:5]+[('c.ipynb','demo/index.html')]+wrong[5:]

STAND_INS = dict( # what `make site` calls beside nbdev: Quarto, of which only what it copies is done, and the explorer's command, which writes as `--folder` does
    quarto="""
with open(os.environ['QUARTO_CALLS'], 'a') as f: print(os.getcwd(), 'quarto', *sys.argv[1:], file=f)
os.mkdir('_docs')
for folder in yaml.safe_load(open('_quarto.yml').read())['project'].get('resources', []): shutil.copytree(folder, f'_docs/{folder}')
""", wikichurches_explore="""
study,flag,out_flag,out = sys.argv[1:]
assert (study,flag,out_flag)==('runs/demo','--folder','--out') and os.path.isdir(study)
os.makedirs(f'{out}/data')
for name in ('index.html','data/run0.hits'): open(f'{out}/{name}', 'w').close()
""")

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "The site as `make site` makes it of a study that is there, in a copy, with stand-ins for what is not tested here."
    home = tmp_path_factory.mktemp('site')
    for name in ('nbs','ssl_wikichurches','settings.ini','README.md','Makefile'):
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, home/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints','*.safetensors','demo'))
        else: shutil.copy(ROOT/name, home/name)
    (home/'runs'/'demo').mkdir(parents=True)
    (home/'runs'/'demo'/'report.html').write_text('the report')
    (home/'bin').mkdir()
    for name,code in STAND_INS.items():
        (home/'bin'/name).write_text(f'#!{sys.executable}\nimport os, shutil, sys, yaml{code}')
        (home/'bin'/name).chmod(0o755)
    (home/'bin'/'nbdev_docs').write_text(f'#!/bin/sh\nexec {Path(sys.executable).parent}/nbdev_docs --n_workers 0\n')
    (home/'bin'/'nbdev_docs').chmod(0o755)
    env = os.environ|dict(PATH=f"{home/'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", QUARTO_CALLS=str(home/'calls'))
    done = subprocess.run(['make','-o','study','site','BIN=bin'], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stdout+done.stderr
    return home

def test_nbdev_hands_every_page_to_quarto(processed):
    calls = (processed/'calls').read_text()
    assert 'quarto render --no-cache' in calls
    assert sorted(p.name for p in (processed/'_proc').glob('*.ipynb'))==[p.name for p in NOTEBOOKS]
    made = yaml.safe_load((processed/'_proc'/'nbdev.yml').read_text())
    assert made['project']['output-dir']=='_docs' and made['website']['title']=='ssl_wikichurches'
    assert yaml.safe_load((processed/'_proc'/'_quarto.yml').read_text())==QUARTO

def test_the_workflow_makes_the_site_that_is_tested():
    steps = yaml.safe_load((ROOT/'.github'/'workflows'/'site.yml').read_text())['jobs']['site']['steps']
    assert [s['run'] for s in steps if 'run' in s]==['make site']
    from inspect import signature
    from ssl_wikichurches.cli import wikichurches_explore
    assert {'root','folder','out'}<={*signature(wikichurches_explore).parameters}

# ---- figures and tables

def outputs(folder):
    "Page, source and outputs of each cell that is shown."
    for p in sorted(folder.glob('*.ipynb')):
        for c in json.loads(p.read_text())['cells']:
            if c['cell_type']=='code' and c['outputs']: yield p.name, ''.join(c['source']), [o.get('data', {}) for o in c['outputs']]

class Rows(HTMLParser):
    "Texts of a table's cells, row by row, and whether a row is of the head."
    def __init__(self, html):
        super().__init__()
        self.rows,self.head,self.span = [],False,0
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        if tag in ('thead','tbody'): self.head = tag=='thead'
        if tag=='tr': self.rows.append(([], self.head))
        if tag in ('td','th'): self.span = int(dict(attrs).get('colspan', 1)); self.rows[-1][0].extend(['']*self.span)
    def handle_data(self, text):
        if self.span: self.rows[-1][0][-self.span:] = [self.rows[-1][0][-1]+text]*self.span
    def handle_endtag(self, tag):
        if tag in ('td','th'): self.span = 0

def wrong_figures(cells):
    "Figures without alt text, labels without caption, numbered figures of too few pixels, and a p that is printed as zero."
    wrong,labels = [],[]
    for name,code,shown in cells:
        said = dict(re.findall(r'^#\| *([\w-]+): *(.*)', code, re.M))
        kinds = {k for d in shown for k in d}
        if any(k.startswith('image/') for k in kinds) and len(said.get('fig-alt', ''))<20: wrong.append((name, 'no alt text', code[-60:]))
        if (label:=said.get('label')) and (f"{label[:3]}-cap" not in said or (label[:3]=='tbl')!=('text/html' in kinds)): wrong.append((name, 'no caption', label))
        if label: labels.append((name, label))
        if label and 'image/png' in kinds: wrong.append((name, 'not sharp: make outputs', label))
        for html in (''.join(d['text/html']) for d in shown if 'text/html' in d):
            rows = Rows(html).rows
            heads,body = [r for r,head in rows if head],[r for r,head in rows if not head]
            for r in body:
                of = [r[0], *(h[-k] for h in heads for k in range(1, len(r)+1) if k<=len(h) and re.fullmatch(r'0\.0+', r[-k]))]
                if any(re.fullmatch(r'0\.0+', v) for v in r[1:]) and any(re.search(r'^(.*_)?p(_\w+)?$', o) for o in of): wrong.append((name, 'p of zero', r[0]))
    return wrong+[(n, 'twice', l) for n,l in {*labels} if labels.count((n,l))>1]

def test_figures_and_tables(processed):
    found = [*outputs(processed/'_proc')]
    assert {*wrong_figures(found)}<={('02b_metrics.ipynb', 'not sharp: make outputs', 'fig-ceiling')}
    said = '\n'.join(code for _,code,_ in found)
    assert said.count('fig-alt:')>=100 and said.count('#| fig-cap:')>=30 and said.count('#| tbl-cap:')>=30

def test_wrong_figures_would_be_found(processed):
    found = {code:(name, code, shown) for name,code,shown in outputs(processed/'_proc')}
    name,code,shown = next(v for k,v in found.items() if 'label: fig-calibration' in k)
    bare = re.sub(r'#\| fig-alt.*\n', '', code)
    assert [w[1] for w in wrong_figures([(name, bare, shown)])]==['no alt text']
    assert [w[1] for w in wrong_figures([(name, re.sub(r'#\| fig-cap.*\n', '', code), shown)])]==['no caption']
    assert [w[1] for w in wrong_figures([(name, code, shown)]*2)]==['twice']
    assert [w[1] for w in wrong_figures([(name, code, [{'image/png':''}])])]==['not sharp: make outputs']
    zero = [{'text/html':'<table><thead><tr><th></th><th>p</th></tr></thead><tbody><tr><td>a</td><td>0.000</td></tr></tbody></table>'}]
    assert wrong_figures([('a', 'table', zero)])==[('a', 'p of zero', 'a')]

def test_columns_are_in_the_legend():
    "Of the tables that people see."
    legend = md_of(NBS/'index.ipynb').partition('## Columns of the tables')[2].partition('\n## ')[0]
    known = {*re.findall(r'`([\w@]+)`', legend)}
    for table in ('demo/table','demo/verdicts','calibration/table'):
        columns = {*pd.read_csv(ROOT/'results'/f'{table}.csv', nrows=0).columns}-{'model','tier'}
        assert not (lost:={c for c in columns-known if not re.match(r'layout_|d_z_|d_av_', c)}), f'{table}: {lost}'

def test_links_of_the_pages(processed):
    "Also those that nbdev made of names in backticks."
    url = yaml.safe_load((processed/'_proc'/'nbdev.yml').read_text())['website']['site-url']
    assert any('](backbones.html#load_backbone)' in md for md,_ in pages(processed/'_proc').values())
    assert not dead(processed/'_proc', url, processed/'_docs')

def test_explorer_and_report_are_in_the_site(processed, tmp_path):
    "And a link to one that is not there is found: on the front page, on the page of the explorer, and in the menu."
    made = {p.relative_to(processed/'_docs').as_posix() for p in (processed/'_docs').rglob('*') if p.is_file()}
    assert made=={'demo/index.html','demo/data/run0.hits','demo/report.html'}
    url = yaml.safe_load((processed/'_proc'/'nbdev.yml').read_text())['website']['site-url']
    assert dead(processed/'_proc', url, tmp_path)==[('index.ipynb','demo/report.html'), ('demonstration.qmd','demo/report.html'), *[('demonstration.qmd','demo/index.html')]*2]
    assert wrong_navigation(QUARTO['website'], tmp_path)==['demo/report.html']

# ---- entries of functions and classes

def fences(md): return re.findall(r'^```.*?\n(.*?)^```', md, re.M|re.S)

def broken_blocks(found):
    "Blocks of code in which markdown would show as such, or names of Python's own instead of the author's."
    return [(name, m[0]) for name,(md,_) in found.items() for block in fences(md) for m in re.finditer(r'\[[^\]\n]*\]\([^)\n]*\)|VAR_(POSITIONAL|KEYWORD)|<factory>', block)]

def public_classes():
    "From the modules: class, page, and comments of its fields."
    syms = {k:v for d in json.loads(json.dumps(importlib.import_module('ssl_wikichurches._modidx').d['syms'])).values() for k,v in d.items()}
    for p in (ROOT/'ssl_wikichurches').rglob('[a-z]*.py'):
        text = p.read_text()
        for node in ast.parse(text).body:
            full = '.'.join((*p.relative_to(ROOT).with_suffix('').parts, getattr(node, 'name', '')))
            if not isinstance(node, ast.ClassDef) or full not in syms or node.name.startswith('_'): continue
            lines = [text.splitlines()[f.end_lineno-1].partition(' # ') for f in node.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith('_')]
            yield node.name, syms[full][0].partition('#')[0], [c for _,_,c in lines if c]

def lost_comments(found):
    page_of = {re.search(r'^output-file: *(\S+)', md, re.M).group(1):md for md,_ in found.values() if 'output-file:' in md}
    return [(name, c) for name,page,comments in public_classes() for c in comments if not any(c in b for b in fences(page_of.get(page, '')) if f'class {name}' in b)]

def test_entries_are_whole(processed):
    found = pages(processed/'_proc')
    assert not broken_blocks(found) and not lost_comments(found)
    assert sum(len(c) for _,_,c in public_classes())>300
    assert sum('{.api-links}' in md for md,_ in found.values())>60

def parameters(code):
    "Of the public definitions of a cell: name of each parameter and field that a page shows, and whether anything is said of it there."
    comments,lines = _comments(code),code.splitlines()
    for n in ast.parse(code).body:
        if not isinstance(n, (ast.FunctionDef,ast.ClassDef)) or n.name.startswith('_'): continue
        shown = [(f.target.id,f,'') for f in n.body if isinstance(f, ast.AnnAssign) and not f.target.id.startswith('_')] if isinstance(n, ast.ClassDef) else []
        for f in [n] if isinstance(n, ast.FunctionDef) else [f for f in n.body if isinstance(f, ast.FunctionDef) and _public(f)]:
            a = f.args
            shown += [(p.arg,p,ast.get_docstring(f) or '') for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p and p.arg not in ('self','cls')]
        for name,at,doc in shown:
            line = lines[at.lineno-1]
            yield f'{n.name}.{name}',any(l in comments for l in range(at.lineno, at.end_lineno+1)) or f'`{name}`' in doc or 'Param(' in line or '#' in say_usual(line)

def bare_parameters(sources): return [name for code in sources for name,said in parameters(code) if not said]

def exported():
    for p in NOTEBOOKS: yield from (src for c in json.loads(p.read_text())['cells'] if c['cell_type']=='code' and re.search(r'^#\| *export\b', src := ''.join(c['source']), re.M))

def test_every_parameter_is_said_something_of():
    assert not bare_parameters(exported())
    assert sum(1 for code in exported() for _ in parameters(code))>2700

def test_a_bare_parameter_would_be_found():
    code = 'class Box:\n    left:int # in pixels\n    top:int\n    def grow(self, by): # pixels\n        return by\n    def cut(self, by): return by\ndef f(\n    seed:int=0,\n    other=1,\n): return seed'
    assert bare_parameters([code])==['Box.top','Box.by','f.other']

def test_pages_are_made_without_the_study():
    "Seventy-eight pages take seconds, because nothing of the study is imported for them."
    names = {a.name.partition('.')[0] for n in ast.walk(ast.parse((ROOT/'ssl_wikichurches'/'study'/'pages.py').read_text())) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.partition('.')[0] for n in ast.walk(ast.parse((ROOT/'ssl_wikichurches'/'study'/'pages.py').read_text())) if isinstance(n, ast.ImportFrom)}
    assert names<={*sys.stdlib_module_names}

def test_broken_entries_would_be_found(processed):
    name = '06a_plan.ipynb'
    md,code = pages(processed/'_proc')[name]
    assert broken_blocks({name:(md.replace('metric:str', 'metric:[str](a.html)', 1), code)})==[(name, '[str](a.html)')]
    assert broken_blocks({name:(md.replace('metric:str', 'args:VAR_POSITIONAL', 1), code)})
    assert ('Study', 'see `class_labels`') in lost_comments({name:(md.replace(' # see `class_labels`', ''), code)})

# ---- papers

KEYS = re.findall(r'^@\w+\{(\S+),', (NBS/'references.bib').read_text(), re.M)

def cited(found):
    prose = {name:re.sub(r'```.*?```|`[^`\n]*`', '', md, flags=re.S) for name,(md,_) in found.items()}
    return {(name, k) for name,md in prose.items() for k in re.findall(r'(?<![\w\\])@([a-z]+\d{4}\w*)', md)}

def wrong_papers(found, keys):
    "Keys that no entry has, entries that no page cites, and links to papers that are not in the bibliography."
    used = cited(found)
    bare = [(name, to) for name,(md,_) in found.items() for to in re.findall(r'\]\((https?://(?:arxiv\.org/abs|doi\.org)/[^)\s]+)', md) if 'zenodo' not in to]
    return [(n,k) for n,k in sorted(used) if k not in keys]+sorted(set(keys)-{k for _,k in used})+bare

def test_papers(processed):
    assert len(KEYS)==len(set(KEYS))>80
    assert not wrong_papers(pages(processed/'_proc'), KEYS)

def test_a_wrong_paper_would_be_found(processed):
    found = pages(processed/'_proc')
    md,code = found['02d_saliency_metrics.ipynb']
    faulty = found|{'02d_saliency_metrics.ipynb':(md.replace('@bylinskii2019metrics', '@bylinskii2091metrics')+' See [x](https://arxiv.org/abs/0000.00000).', code)}
    wrong = wrong_papers(faulty, [*KEYS, 'nobody1900nothing'])
    assert ('02d_saliency_metrics.ipynb','bylinskii2091metrics') in wrong and 'nobody1900nothing' in wrong and ('02d_saliency_metrics.ipynb','https://arxiv.org/abs/0000.00000') in wrong
