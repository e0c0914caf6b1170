"The report in a browser: what a reader sees, presses and copies; and the files of the paper."
import io, re, shutil, subprocess
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree
import pandas as pd, pytest
from pylatexenc.latex2text import LatexNodes2Text
from pylatexenc.latexwalker import LatexWalker, LatexWalkerParseError
from ssl_wikichurches.study.analysis import Analysis, Table, analyse
from ssl_wikichurches.study.paper import Exhibit, caption, latex_table, latex_text, write_paper
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.reader import open_study
from ssl_wikichurches.study.report import _lead, _reasons, _unseen, answer, findings, five_numbers, write_report
from ssl_wikichurches.study.runs import run_study

TIERS = ('linear','lora','full','random_labels')
RECIPES = dict(linear=dict(epochs=2), lora=dict(epochs=1), full=dict(epochs=1))

@pytest.fixture(scope='module')
def analysis(drawn, few_questions, tmp_path_factory):
    "One model, two tiers, a control and two seeds. Not to be changed."
    study = Study('pages', data=str(drawn), models=('tiny-clip',), tiers=TIERS, seeds=(0,1), size=64, val=.3, recipes=RECIPES)
    with ThreadPoolExecutor(1) as pool: return analyse(open_study(run_study(study, tmp_path_factory.mktemp('runs'), pool, device='cpu', progress=False)))

@pytest.fixture(scope='module')
def report(analysis): return write_report(analysis)

@pytest.fixture
def opened(browser, report):
    "Opens the report in a window; a page that speaks of an error or asks the network for anything is refused."
    said,asked,contexts = [],[],[]
    def window(width=1280, height=900, scheme='light', more=''):
        contexts.append(context := browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme))
        page = context.new_page()
        page.add_init_script("navigator.clipboard.writeText = async text => { window.copied = text }")
        page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: asked.append(r.url))
        page.goto(report.as_uri()+more)
        return page
    yield window
    for c in contexts: c.close()
    assert not said and all(url.startswith('file:') or url.startswith('data:') for url in asked), (said, asked)

def open_all(page):
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    return page

WIDER = "document.documentElement.scrollWidth-innerWidth"
SMALL = """() => [...document.querySelectorAll('svg text')].filter(t => t.checkVisibility() && t.getBoundingClientRect().width)
    .filter(t => parseFloat(getComputedStyle(t).fontSize)*Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)<11.9).map(t => t.textContent)""" # nine points are twelve pixels
PALE = """() => {
    const rgb = c => c.match(/[\\d.]+/g).map(Number)
    const light = c => { const [r,g,b] = rgb(c).map(v => v/255).map(v => v<=.04045 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r+.7152*g+.0722*b }
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if ((rgb(c)[3] ?? 1)>.99) return c }; return 'rgb(255,255,255)' }
    const found = []
    for (const e of document.querySelectorAll('body *')) {
        if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType===3 && n.data.trim())) continue
        const color = e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color, a = light(color), b = light(ground(e))
        const contrast = (Math.max(a,b)+.05)/(Math.min(a,b)+.05)
        if (contrast<4.5) found.push([e.textContent.slice(0,40), color, ground(e), contrast])
    }
    return found }"""

@pytest.mark.parametrize('scheme', ('light','dark'))
def test_a_telephone_need_not_scroll_sideways_and_all_can_read(opened, scheme):
    page = open_all(opened(390, 844, scheme))
    assert page.evaluate(WIDER)==0 and page.evaluate(PALE)==[] and page.evaluate(SMALL)==[]

@pytest.mark.parametrize('scheme', ('light','dark'))
def test_a_desk(opened, scheme):
    page = open_all(opened(1280, 900, scheme))
    assert page.evaluate(WIDER)==0 and page.evaluate(PALE)==[] and page.evaluate(SMALL)==[]

def test_the_checks_see_what_they_look_for(opened):
    page = opened(390)
    page.evaluate("document.querySelector('h1').insertAdjacentHTML('afterend', '<p style=\"width:500px\">wide</p><p style=\"color:#999\">pale</p>')")
    assert page.evaluate(WIDER)>100 and [f[0] for f in page.evaluate(PALE)]==['pale']
    page.evaluate("document.querySelector('figure.narrow svg').style.width = '150px'")
    assert 'shift of IoU@90' in page.evaluate(SMALL)

def test_the_first_screen_answers(opened, analysis):
    page = opened()
    for sentence in answer(analysis): assert sentence in page.inner_text('header')
    assert page.locator('.numbers div').count()==5 and page.locator('details[open]').count()==0
    assert page.locator('.lead').bounding_box()['y']+page.locator('.lead').bounding_box()['height']<450 and page.locator('figure.wide').first.bounding_box()['y']<900
    shown = page.locator('.finding').all_inner_texts()
    assert [*findings(analysis).values()] and {*findings(analysis).values()}=={*shown}

def column(page, table, name):
    return page.evaluate("""([t,c]) => { const table = document.querySelector(`table[data-name=${t}]`), at = [...table.querySelectorAll('th')].findIndex(h => h.textContent===c)
        return [...table.tBodies[0].rows].map(r => r.cells[at].dataset.v ?? r.cells[at].textContent) }""", [table, name])

def test_tables_sort_by_the_numbers_and_not_by_their_looks(opened, analysis):
    page = open_all(opened())
    wanted = analysis['shift']['shift'].sort_values(kind='stable').tolist()
    head = page.locator('table[data-name=shift] th', has_text=re.compile('^shift$'))
    head.locator('button').click()
    assert [float(v) for v in column(page, 'shift', 'shift')]==wanted and head.get_attribute('aria-sort')=='ascending'
    head.locator('button').click()
    assert [float(v) for v in column(page, 'shift', 'shift')]==wanted[::-1] and head.get_attribute('aria-sort')=='descending'
    holm = page.locator('table[data-name=shift] th', has_text='p_holm')
    holm.locator('button').click()
    values = column(page, 'shift', 'p_holm')
    assert values[-1]=='' and [float(v) for v in values[:-1]]==sorted(analysis['shift'].p_holm.dropna()) # the linear probe has none
    page.locator('table[data-name=shift] th', has_text='tier').locator('button').click()
    assert column(page, 'shift', 'tier')==sorted(analysis['shift'].tier)

def test_what_is_copied_is_the_table(opened, analysis):
    page = open_all(opened())
    for name in ('robustness','verdicts','frozen'):
        page.locator('details.table', has=page.locator(f'table[data-name={name}]')).locator('.copy').click()
        copied = pd.read_csv(io.StringIO(page.evaluate('window.copied')), keep_default_na=False, na_values={c:[''] for c in analysis[name].select_dtypes('number')})
        assert len(copied.columns)>4 and len(copied)==len(analysis[name])
        for c in copied: pd.testing.assert_series_equal(copied[c], analysis[name][c] if analysis[name][c].dtype!=bool else analysis[name][c].map({True:'yes',False:'no'}), check_dtype=False, rtol=0)
    assert page.locator('[role=status]', has_text='copied').count()==3

def test_keys_and_addresses_open_a_section(opened):
    page = opened()
    for _ in range(60):
        page.keyboard.press('Tab')
        if page.evaluate("document.activeElement.matches('#shift summary')"): break
    page.keyboard.press('Enter')
    assert page.locator('#shift > details[open]').count()==1 and page.locator('details[open]').count()==1
    page.keyboard.press('Enter')
    assert page.locator('details[open]').count()==0
    page.locator('nav a', has_text='By block').click()
    page.wait_for_selector('#blocks > details[open]')
    page.locator('#all').press('Enter')
    assert page.locator('details.part:not([open])').count()==0
    assert opened(more='#parts').locator('#parts > details[open]').count()==1

def test_light_and_dark_and_paper(opened):
    page = opened(scheme='dark')
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator('#theme').click()
    assert page.evaluate(ground)=='rgb(255, 255, 255)'!=dark
    page.locator('#theme').click()
    page.emulate_media(media='print'); page.set_viewport_size(dict(width=720, height=1000)) # a sheet of paper
    table = page.locator('table[data-name=robustness]')
    assert page.evaluate(ground)=='rgb(255, 255, 255)' and not page.locator('nav').is_visible() and page.locator('#shift figure').is_visible() and not table.is_visible()
    assert open_all(page).evaluate(WIDER)==0 and table.is_visible()

# ---- the answer

def verdicts(*words, **columns):
    "Rows of a table of verdicts, made up."
    rows = pd.DataFrame(dict(model='clip', tier=[f'full-{i}' for i in range(len(words))], verdict=words, metric='iou@90', n=50, seeds=3, over='churches and seeds', shift=.02, low=.01, high=.03,
                             p_holm=.01, layout_metric='shuffled_auroc', layout_shift=.02, layout_low=.01, layout_high=.03, layout_p=.001, inside_shift=float('nan'), inside_low=float('nan'),
                             inside_high=float('nan'), inside_p=float('nan'), beyond='random_labels', not_beyond='', missing='other_task',
                             detectable=.03, detectable_mass=.1, declared=True))
    return rows.assign(**columns)

@pytest.mark.parametrize('words,begins', [
    (['towards']*3, 'Yes: attention moved towards the boxed parts under all 3 recipes.'), (['towards','not shown'], 'In part: attention moved towards the boxed parts under 1 of 2 recipes.'),
    (['away','layout only'], 'No, the other way: attention moved away from the boxed parts under 1 of 2'), (['towards','away'], 'Both: attention moved towards the boxed parts under 1 of 2 recipes, and away'),
    (['equivalent to none']*2, 'No: under all 2 recipes attention stayed where it was, within the declared margin of 0.01'), (['equivalent to none','not shown'], 'Not shown: under none of 2 recipes'),
    (['layout only'], 'Not shown'), (['no more than any training','no control'], 'Not shown'), (['one model']*2, 'Open')])
def test_yes_no_and_open(words, begins): assert _lead(verdicts(*words), .01).startswith(begins)

def said(**columns): return _reasons(verdicts('x', **columns).iloc[0], .05)

def test_layout_and_controls_are_told_apart():
    assert 'went the same way (+0.020' in said() and 'it exceeds that under random labels (not run: other task)' in said()
    assert 'may be one of layout' in said(layout_p=.3) and 'did not follow' in said(layout_p=.3) and 'layout alone does not move, did not follow' in said(layout_p=.3, p_holm=.5) and 'may be' not in said(layout_p=.3, p_holm=.5)
    assert 'went the other way' in said(layout_shift=-.02) and 'went the same way' in said(metric='kl', shift=-.02) # a loss of divergence is a gain
    lost = dict(shift=-.02, inside_shift=-.01, inside_low=-.02, inside_high=-.005, inside_p=.01)
    assert said(**lost).startswith('IoU@90 without border and artifacts went the same way (−0.010, −0.020 to −0.005);') and 'may be one of layout' in said(**lost|dict(inside_p=.2))
    assert 'no control was run' in said(beyond='', missing='random_labels') and 'it was not shown to exceed that under random labels or random init' in said(beyond='', not_beyond='random_labels, random_init')
    assert 'it exceeds that under other task, but it was not shown to exceed that under random labels' in said(beyond='other_task', not_beyond='random_labels')

def test_what_could_not_have_been_seen():
    v = verdicts('towards','not shown','not shown', detectable=[.5,.02,.03], detectable_mass=[float('nan'),.04,.125])
    assert 'a shift below 0.020 to 0.030 (as if 4.0 to 12.5 % of the frozen attention' in _unseen(v)
    assert 'more than a third' in _unseen(verdicts('not shown', detectable_mass=float('nan'))) and _unseen(verdicts('towards', detectable_mass=float('nan'))).startswith('A shift below 0.030 would')

def test_an_answer_is_about_the_largest_claim(analysis):
    v = analysis['verdicts'].assign(verdict='towards', p_holm=.001)
    v['shift'] = [-.2,.05]; v.loc[0, 'verdict'] = 'layout only'
    changed = Analysis(analysis.path, analysis.facts, analysis.tables|dict(verdicts=Table(analysis.tables['verdicts'].about, v)), {})
    r = v[v['shift']==.05].iloc[0]
    assert f'The largest such shift, under {r.tier} of {r.model}' in answer(changed)[1] and five_numbers(changed)[2][0]=='+0.050'

# ---- the paper

@pytest.fixture(scope='module')
def paper(analysis, tmp_path_factory): return write_paper(analysis, tmp_path_factory.mktemp('paper'))

def test_files_of_the_paper(paper, analysis):
    folder,shown,lacking = paper
    drawn = {e.name for e in shown if e.is_figure}
    assert {'frozen','shift','tiers','levels','differences','controls','accuracy','forgetting','styles','blocks','heads','head-levels'}<=drawn and {*lacking}>={'supervised','paths'}
    assert {p.name for p in (folder/'figures').iterdir()}=={f'{n}.{k}' for n in drawn for k in ('svg','pdf')}
    for p in (folder/'figures').glob('*.svg'): assert ElementTree.parse(p).getroot().tag.endswith('svg')
    assert all(p.read_bytes()[:5]==b'%PDF-' for p in (folder/'figures').glob('*.pdf'))
    assert {p.stem for p in (folder/'tables').iterdir()}=={e.name for e in shown if not e.is_figure}>={'frozen','shift','verdicts','control_contrasts','robustness','styles'}
    assert lacking['supervised'].startswith('no tier used boxes') and '/pages/paths.csv does it' in lacking['paths']

def test_every_caption_says_what_a_number_needs(paper, analysis, drawn):
    for e in paper[1]:
        for word in ('n: ','Unit: ','Interval: ','Tests: ','Metric: IoU@90',f'Data: {drawn.name}, 12 photographs'): assert word in e.caption, (e.name, word)
    birds = Analysis(analysis.path, analysis.facts|dict(called=['bird','birds']), analysis.tables, {})
    assert 'n: 12 birds, 2 seeds' in caption(birds, 'shift') and 'church' not in caption(birds, 'shift')
    moved = Analysis(analysis.path, analysis.facts|dict(study=analysis.facts['study']|dict(data='world-boxed')), analysis.tables, {})
    assert 'Drawn data (world-boxed)' in caption(moved, 'shift') and 'n: 12 churches, 2 seeds' in caption(moved, 'shift') and 'seeds' not in caption(moved, 'frozen').split('Unit')[0]

def parsed(text):
    "The nodes of a LaTeX text, read strictly."
    return LatexWalker(text, tolerant_parsing=False).get_latex_nodes()[0]

def test_latex_can_be_read_and_holds_the_numbers(paper, analysis):
    folder,shown,_ = paper
    document = (folder/'paper.tex').read_text()
    assert parsed(document) and all(f'\\input{{tables/{e.name}}}' in document if not e.is_figure else f'{{figures/{e.name}}}' in document for e in shown)
    for p in (folder/'tables').iterdir():
        assert parsed(text := p.read_text()) and not re.search(r'(?<!\\)[%#]', text) and text.count('toprule') in (1,2)
        assert not re.search(r'(?<!\\)_', re.sub(r'\\label\{.*?\}', '', text))
    rows = [r for r in (folder/'tables'/'shift.tex').read_text().split('\\midrule')[1].split('\n') if r.endswith(r'\\')]
    s = analysis['shift']
    assert [r.split(' & ')[6].replace('$-$','-') for r in rows]==[f'{v:+.4f}' for v in s['shift']] and rows[0].startswith('tiny-clip & linear & 12 & 2 &')

@pytest.mark.skipif(not shutil.which('pdflatex'), reason='no pdflatex here: the document is read, but not printed')
def test_latex_prints_it(paper, tmp_path):
    "Without an error or a line that is too wide; also characters that are special to it."
    folder = tmp_path/'paper'
    shutil.copytree(paper[0], folder)
    odd = Exhibit('odd', '\\ & % $ # _ { } ~ ^ < > | \u2212 \u00b1 \u2264 \u2265 \u2013 \u201cq\u201d \u00e9', pd.DataFrame(dict(a_b=['x_y','50 %'], shift=[-.1,.2])))
    text = (folder/'paper.tex').read_text()
    (folder/'paper.tex').write_text(text.replace('\\end{document}', latex_table(odd)+'\\end{document}'))
    done = subprocess.run(['pdflatex','-interaction=nonstopmode','-halt-on-error','paper.tex'], cwd=folder, capture_output=True, text=True, errors='replace')
    assert done.returncode==0, done.stdout[-2000:]
    assert not re.findall(r'^!.*|Overfull.*', done.stdout, re.M) and (folder/'paper.pdf').read_bytes()[:5]==b'%PDF-'

def test_text_cannot_break_latex():
    for bad in ('a_b & 50 % of $x^2$ {y} ~ \\end{document} #1 <.001 | >', 'tiny_näme'):
        nodes = parsed(latex_text(bad))
        assert LatexNodes2Text().nodelist_to_text(nodes).replace('\xa0', ' ').replace('ˆ', '^')==bad
    with pytest.raises(LatexWalkerParseError): parsed('a {b')

def test_a_study_that_lacks_tables_says_so(analysis, tmp_path):
    few = Analysis(tmp_path/'study'/'tables', analysis.facts, {k:analysis.tables[k] for k in ('frozen','baselines','costs')}, {})
    folder,shown,lacking = write_paper(few)
    assert folder==tmp_path/'study'/'paper' and {e.name for e in shown if e.is_figure}=={'frozen'} and {v for k,v in lacking.items() if k!='paths'}=={'nothing was fine-tuned'}
    assert '% shift is left out: nothing was fine-tuned' in (folder/'paper.tex').read_text() and parsed((folder/'paper.tex').read_text())
    paths = pd.DataFrame(dict(model='tiny-clip', tier='full', alpha=[0.,1.], own_start=False, seeds=2, accuracy=.5, balanced_accuracy=[.3,.5], macro_f1=.4, iou=[.1,.2], delta=[0,.1], low=[0,.05], high=[0,.15], churches=12))
    paths.to_csv(tmp_path/'study'/'paths.csv', index=False)
    assert 'paths' in {e.name for e in write_paper(few)[1]} and (folder/'figures'/'paths.svg').is_file()
