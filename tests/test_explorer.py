"The explorer of a study, as a reader meets it: in a browser."
import base64, functools, http.server, json, shutil, threading
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from ssl_wikichurches.attention.metrics import chance_of_top, iou_at_percentile, n_kept, upsample
from ssl_wikichurches.cli import wikichurches_explore
from ssl_wikichurches.data.churches import box_mask
from ssl_wikichurches.data.files import write_tensors
from ssl_wikichurches.study.explorer import explorer_entries, explorer_file, explorer_study, unpack_numbers, write_explorer, write_explorer_folder
from ssl_wikichurches.study.reader import open_study
from ssl_wikichurches.study.runs import score_moments
from ssl_wikichurches.study.when import turns_table, when_sentence, when_table

RUN = 'tiny-clip-full-seed0'

@pytest.fixture(scope='module')
def opened(finished): return open_study(finished)

@pytest.fixture(scope='module')
def single(opened, tmp_path_factory): return write_explorer(opened, tmp_path_factory.mktemp('page')/'explorer.html').path

@pytest.fixture
def show(browser):
    "Opens an address; at the end nothing may have been complained of, and nothing asked of a network."
    contexts,said,asked = [],[],[]
    def go(address, fragment='', width=1200, **how):
        contexts.append(browser.new_context(viewport=dict(width=width, height=900), **how))
        page = contexts[-1].new_page()
        page.on('console', lambda m: said.append(m.text)); page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: asked.append(r.url))
        page.goto((address if isinstance(address, str) else address.as_uri())+fragment)
        return settled(page)
    go.said,go.asked = said,asked
    yield go
    for c in contexts: c.close()
    assert not said and not [u for u in asked if not u.startswith(('file:','data:','blob:','http://127.0.0.1'))]

def settled(page):
    page.wait_for_selector('#wc-explorer[aria-busy=false]')
    return page

def ask(page, script, *args): return page.evaluate(f'async args => {{ const e = document.getElementById("wc-explorer").explorer; await e.ready; {script} }}', [*args])
def numbers(page): return [float(e.get_attribute('data-value')) for e in page.locator('.wc-row').first.locator('.wc-iou').all()]
def state(page): return ask(page, 'return e.state')
def choose(page, **values):
    for k,v in values.items(): page.locator(f'select[data-key={k}]').select_option(v)
    return settled(page)

# ---- numbers

@pytest.fixture(scope='module')
def module(browser):
    "The functions of the module, called with plain values."
    page = browser.new_page()
    text = files('ssl_wikichurches').joinpath('templates/explorer.js').read_text(encoding='utf-8')
    page.evaluate('async text => { window.m = await import(URL.createObjectURL(new Blob([text], {type: "text/javascript"}))) }', text)
    return lambda script, *args: page.evaluate(f'args => {{ {script} }}', [*args])

@pytest.mark.parametrize('g,size', [(8,64), (7,63), (6,96), (12,96), (14,224), (16,224), (9,9)])
def test_pixels_are_those_of_pytorch_to_the_last_bit(module, g, size):
    rng = np.random.default_rng(g)
    maps = torch.tensor(np.stack([rng.random((g,g))**6, np.round(rng.random((g,g))*3)/3])).half().float() # peaks; ties
    script = """return args[0].flatMap(map => [true, false].map(f => {
      const bytes = new Uint8Array(m.upsample(map, args[1], args[2], f).buffer)
      let text = ''; for (let i = 0; i<bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i+8192))
      return btoa(text) }))"""
    found = [np.frombuffer(base64.b64decode(t), '<f4').reshape(size,size) for t in module(script, maps.flatten(1).tolist(), g, size)]
    for heat,fused,apart in zip(upsample(maps, size).numpy(), found[::2], found[1::2]):
        assert (fused==heat).all() or (apart==heat).all() # a processor multiplies and adds at once, or one after the other
        assert abs(fused-heat).max()<1e-6>abs(apart-heat).max()

def test_what_is_kept_and_what_chance_would_give(module):
    asked = [(n,q) for n in (64,63*63,96*96,224*224) for q in range(50,99)]
    assert module('return args.map(a => m.nKept(...a))', *asked)==[n_kept(n, q) for n,q in asked]
    heat = torch.tensor([[3.,1,1],[1,2,1],[1,1,3]])
    assert module('const v = Float32Array.from(args[0]); return Array.from(m.keep(v, v.slice().sort(), 5))', heat.flatten().tolist())==[1,1,1,0,1,0,0,0,1] # ties: the earlier
    boxes = [[1.5,2.,4.25,7.5],[3.5,0,4.,3.]]
    assert module('return Array.from(m.boxMask(args[0], 8))', boxes)==box_mask(torch.tensor(boxes), 8).int().flatten().tolist()
    for area,n,k in ((5,64,6),(900,9216,922),(64,64,6)): assert module('return m.chance(...args)', area, n, k)==pytest.approx(chance_of_top(area, n, k), rel=1e-9)

def test_every_number_of_the_page_is_that_of_the_table(opened, single, show):
    page,entries,n = show(single),explorer_entries(opened),0
    photos = [p['name'] for p in explorer_study(opened)['photos']]
    for i,e in enumerate(entries):
        table = pd.read_parquet(opened.path/e.runs[0][0]/'metrics.parquet').query("metric.str.startswith('iou@') and metric!='iou@area'")
        table = table[table.image.isin(photos[:3])&table['head'].isin(('mean','2'))].assign(q=lambda d: d.metric.str[4:].astype(int), photo=lambda d: d.image.map(photos.index))
        cells = [[int(r.photo), int(r.block), r.head, int(r.q)] for r in table.itertuples()]
        found = ask(page, 'return Promise.all(args[1].map(async c => (await e.store.measure(args[0], ...c)).iou))', i, cells)
        assert found==table.value.tolist()
        n += len(found)
    assert n==8*3*2*10*2.5 # entries, photographs, heads, percentiles, and blocks: four, or one of a pooling head

def test_shown_numbers_are_those_of_the_table(opened, single, show):
    page = show(single, '#model=tiny-clip&tier=full&block=2&head=1&q=75')
    name = state(page)['photo']
    before,after = (opened.values(r, 'iou@75', 2, '1')[name] for r in ('tiny-clip-frozen', RUN))
    assert numbers(page)==[before, after, after-before]
    assert page.locator('.wc-iou').all_inner_texts()[:2]==[f'{before:.4f}', f'{after:.4f}']
    boxes,size = opened.photographs('tiny-clip').boxes[[*opened.photographs('tiny-clip').names].index(name)],64
    area = int(box_mask(boxes, size).sum())
    assert f'chance {chance_of_top(area, size**2, n_kept(size**2, 75)):.4f}' in page.locator('.wc-levels p').inner_text()

def test_a_page_says_where_it_disagrees_with_the_table(opened, single, show, tmp_path):
    "Of one score that was changed behind its back."
    text = single.read_text(encoding='utf-8')
    data = unpack_numbers(explorer_file(opened, 'run6.hits'), 4)
    assert explorer_entries(opened)[6].runs[0][0]==RUN
    from ssl_wikichurches.study.explorer import pack_numbers
    changed = data.copy(); changed[changed<1000] += 1
    old,new = (base64.b64encode(pack_numbers(d)).decode() for d in (data,changed))
    assert text.count(old)==1
    (other := tmp_path/'other.html').write_text(text.replace(old, new), encoding='utf-8')
    texts = show(other, '#model=tiny-clip&tier=full').locator('.wc-iou').all_inner_texts()
    assert 'table' not in texts[0] and 'its processor rounded otherwise' in texts[1]

# ---- what a reader does

def test_sliders_change_picture_and_number(opened, single, show):
    page = show(single, '#model=tiny-clip&tier=full')
    path = lambda: page.locator('.wc-stage path').first.get_attribute('d')
    before,drawn = numbers(page),path()
    page.locator('input[data-key=q]').focus()
    for _ in range(10): page.keyboard.press('ArrowLeft')
    settled(page)
    name = state(page)['photo']
    assert state(page)['q']=='80' and path()!=drawn
    assert numbers(page)[:2]==[opened.values(r, 'iou@80')[name] for r in ('tiny-clip-frozen', RUN)]!=before[:2]
    page.locator('input[data-key=opacity]').focus(); page.keyboard.press('Home'); settled(page)
    assert page.locator('.wc-stage canvas').first.evaluate('c => getComputedStyle(c).opacity')=='0'
    page.locator('input[data-key=kept]').uncheck(); settled(page)
    assert page.locator('.wc-stage path').count()==0
    page.locator('input[data-key=boxes]').uncheck(); settled(page)
    assert page.locator('.wc-box').count()==0

def test_one_scale_for_both_maps(single, show):
    "The same value has the same color in both."
    page = show(single, '#model=tiny-clip&tier=linear') # whose maps are those of the frozen backbone
    pixels = page.locator('.wc-stage canvas').evaluate_all('all => all.map(c => Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data))')
    assert pixels[0]==pixels[1]!=pixels[2] and len(set(map(tuple, np.reshape(pixels[2], (-1,4)).tolist())))==1
    assert numbers(page)[2]==0

def test_a_part_is_named_where_the_pointer_is(single, show):
    page = show(single)
    box = page.locator('.wc-box').first
    part = box.get_attribute('data-part')
    assert box.get_attribute('aria-label')==f'box: {part}'
    box.focus()
    assert box.evaluate('b => getComputedStyle(b, "::after").content')==json.dumps(part)
    page.locator('.wc-stage').nth(1).locator('.wc-box').first.dispatch_event('mouseenter')
    assert page.locator('.wc-lit').count()==3

def test_an_address_restores_everything(single, show):
    page = show(single)
    choose(page, model='tiny-siglip', tier='lora', beside='tiny-clip', head='2', sort='loss', cells='before', over='gallery')
    page.locator('.wc-list button').nth(2).click(); settled(page)
    page.locator('input[data-key=q]').focus(); page.keyboard.press('ArrowLeft'); settled(page)
    first,address = state(page),page.evaluate('location.hash')
    assert first['beside']=='tiny-clip' and first['q']=='89' and page.locator('.wc-row').count()==2
    again = show(single, address)
    assert state(again)==first and numbers(again)==numbers(page)
    assert again.locator('.wc-grid button').evaluate_all('b => b.map(x => x.ariaLabel)')==page.locator('.wc-grid button').evaluate_all('b => b.map(x => x.ariaLabel)')
    again.evaluate('location.hash = "#model=tiny-clip&block=1"'); again.wait_for_function('document.getElementById("wc-explorer").explorer.state.block==="1"'); settled(again)
    assert again.locator('select[data-key=model]').input_value()=='tiny-clip'

def test_an_address_of_nothing_shows_what_is_nearest(single, show):
    page = show(single, '#model=nobody&tier=gone&block=77&head=-1&q=12&style=Rococo&photo=none&other=1')
    s = state(page)
    assert (s['model'],s['tier'],s['block'],s['head'],s['q'],s['style'])==('tiny-clip','full','3','mean','90','') and s['photo'] and 'other' not in s

def test_gallery_is_in_order_and_filtered(opened, single, show):
    page = show(single, '#model=tiny-clip&tier=full&sort=gain')
    gain = opened.values(RUN)-opened.values('tiny-clip-frozen')
    photos = [p['name'] for p in explorer_study(opened)['photos']]
    listed = lambda: [photos[int(b.get_attribute('data-item'))] for b in page.locator('.wc-list button').all()]
    assert [gain[n] for n in listed()]==sorted(gain, reverse=True)
    choose(page, sort='loss')
    assert [gain[n] for n in listed()]==sorted(gain)
    boxes = opened.churches.boxes
    part = boxes.part.value_counts().index[-1]
    choose(page, part=part)
    assert {*listed()}=={*boxes.image[boxes.part==part]} and page.locator('.wc-chosen').count()>0 and state(page)['photo'] in listed()
    names = opened.churches.style_names
    lacking = [s for s in names.values() if s in page.locator('select[data-key=style] option').all_inner_texts() and not any(s in [names[q] for q in opened.churches.images.styles[n]] for n in listed())]
    choose(page, style=lacking[0])
    assert listed()==[] and page.locator('.wc-tally').inner_text().startswith('0 of 12')
    page.keyboard.press('ArrowRight')

def test_grid_leads_to_a_block_and_a_head(opened, single, show):
    page = show(single, '#model=tiny-clip&tier=full')
    name = state(page)['photo']
    page.locator('[data-cell="1 3"]').click(); settled(page)
    change = opened.values(RUN, block=1, head='3')[name]-opened.values('tiny-clip-frozen', block=1, head='3')[name]
    assert (state(page)['block'],state(page)['head'])==('1','3') and numbers(page)[2]==change
    assert f'{abs(change):.4f}' in page.locator('.wc-readout').inner_text()
    assert page.locator('.wc-grid button').count()==4*5
    choose(page, over='gallery', cells='after')
    assert f"{opened.values(RUN, block=1, head='3').mean():.4f}" in page.locator('.wc-readout').inner_text()

def test_keys_alone_do(single, show):
    page = show(single, '#model=tiny-clip&tier=full')
    first = state(page)
    reached = set()
    for _ in range(60):
        page.keyboard.press('Tab')
        reached.add(page.evaluate('(({dataset: d, tagName: t}) => d.key ?? ("cell" in d ? "grid" : "item" in d ? "gallery" : "box" in d ? "box" : t))(document.activeElement)'))
    assert {'model','tier','block','head','beside','q','opacity','boxes','kept','grid','gallery','box','cells','sort','style','part','SUMMARY'}<=reached # a select of one choice is passed over
    for key,what in (('ArrowRight','photo'), ('-','block'), ('>','head'), ('[','q'), ('m','model'), ('t','tier'), ('b','boxes'), ('k','kept')):
        page.evaluate('document.activeElement.blur()'); was = state(page)[what]
        page.keyboard.press(key); settled(page)
        assert state(page)[what]!=was, key
    page = show(single, '#model=tiny-clip&tier=full')
    page.locator('.wc-grid [tabindex="0"]').focus()
    page.keyboard.press('ArrowUp'); page.keyboard.press('ArrowRight'); page.keyboard.press('Enter'); settled(page)
    assert (state(page)['block'],state(page)['head'])==('2','0')
    assert page.evaluate('document.activeElement.dataset.cell')=='2 0' # focus stays through drawing
    page.locator('.wc-list [tabindex="0"]').focus()
    page.keyboard.press('End'); page.keyboard.press('Enter'); settled(page)
    assert state(page)['photo']!=first['photo'] and page.evaluate('document.activeElement.ariaCurrent')=='true'

# ---- looks at a training

def look_at(opened, run, accuracy):
    "Give a run looks: on the way from the frozen maps to its own, some past the end."
    model = opened.recipe(run).model
    before,after = (opened.mean_maps(n) for n in (f'{model}-frozen',run))
    ways,seen = np.r_[0,np.linspace(.2,1.4,len(accuracy)-2),1],opened.photographs(model)
    rows = [dict(step=3*i, epoch=i/2, train_loss=1., val_loss=1., val_accuracy=a, val_balanced_accuracy=a, seconds=.1) for i,a in enumerate(accuracy)]
    pd.DataFrame(rows).to_csv(opened.path/run/'moments.csv', index=False)
    maps = torch.stack([before+w*(after-before) for w in map(float, ways)]).clamp(min=0)
    write_tensors(opened.path/run/'moments.safetensors', dict(maps=maps, steps=torch.tensor([r['step'] for r in rows])), dict(images=json.dumps(seen.names)))
    score_moments(opened.path/run, seen.boxes, [*seen.groups], seen.size)

def test_the_curve_of_a_training_is_that_of_its_table(finished, tmp_path, show):
    root = Path(shutil.copytree(finished, tmp_path/'brief'))
    look_at(open_study(root), RUN, [.2,.3,.55,.9,.85]); look_at(open_study(root), 'tiny-siglip-full-seed0', [.25]*24) # one on a scale of logarithms
    opened = open_study(root)
    table,turns = when_table(opened),turns_table(opened)
    page = show(write_explorer(opened, tmp_path/'e.html').path, '#model=tiny-clip&tier=full&beside=tiny-siglip')
    assert page.locator('.wc-curve').count()==2
    for row,(model,n) in enumerate((('tiny-clip',5),('tiny-siglip',24))):
        rows,curve = table[table.model==model].reset_index(drop=True),page.locator('.wc-row').nth(row).locator('.wc-curve')
        inside = ask(page, 'return e.study.curves.find(c => c.model===args[0]).looks', model)
        assert inside==rows[['epoch','shift','low','high','val_balanced_accuracy']].values.tolist() and len(inside)==n
        said,sign = curve.locator('title').all_text_contents(),lambda v: f'{v:+.4f}'.replace('-', '\u2212')
        assert said==[f'epoch {r.epoch:g}: shift {sign(r.shift)} (95 %: {sign(r.low)} to {sign(r.high)}), balanced accuracy {r.val_balanced_accuracy:.3f}' for r in rows.itertuples()]
        assert curve.locator('figcaption p').first.inner_text()==when_sentence(turns[turns.model==model].iloc[0])
        assert all(t in curve.locator('svg').get_attribute('aria-label') for t in said)
        x,y = np.array(curve.locator('circle').evaluate_all('all => all.map(c => ["cx", "cy"].map(k => Number(c.getAttribute(k))))')).T
        np.testing.assert_allclose(y[0]-y, rows['shift']*np.ptp(y)/np.ptp(rows['shift']), atol=1e-6) # upwards
        assert (np.diff(x)>0).all() and 0<x[0] and x[-1]<300 and ((0<y)&(y<90)).all()
        assert (np.ptp(np.diff(x))<1e-9)==(model=='tiny-clip')
    choose(page, tier='lora')
    assert page.locator('.wc-row').count()==2 and page.locator('.wc-curve').count()==0

def test_a_study_without_looks_has_no_curves(single, show):
    page = show(single, '#model=tiny-clip&tier=full&beside=tiny-siglip')
    assert ask(page, 'return e.study.curves')==[] and page.locator('.wc-curve').count()==0

# ---- how it looks

CONTRAST = '''() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number), light = c => c.slice(0, 3).map(v => v/255).map(v => v<=.04045 ? v/12.92 : ((v+.055)/1.055)**2.4).reduce((t, v, i) => t+v*[.2126, .7152, .0722][i], 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length<4 || c[3]>0) return c } return [255, 255, 255] }
  const found = []
  document.querySelectorAll('details').forEach(d => { d.open = true })
  for (const e of document.querySelectorAll('#wc-explorer *')) {
    if (![...e.childNodes].some(n => n.nodeType===3 && n.textContent.trim()) || e.tagName==='OPTION' || !e.checkVisibility()) continue
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y-x)
    found.push([(a+.05)/(b+.05), e.tagName+' '+e.textContent.slice(0, 30)])
  }
  return found }'''

@pytest.mark.parametrize('scheme', ['light','dark'])
def test_contrast(single, show, scheme):
    page = show(single, '#beside=tiny-siglip', color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert len(found)>50 and min(found)[0]>=4.5, min(found)
    page.evaluate('document.querySelector(".wc-tally").style.color = "#777"')
    assert min(page.evaluate(CONTRAST))[0]<4.5 # the check sees what it looks for

def test_a_phone_scrolls_one_way(single, show):
    page = show(single, '#beside=tiny-siglip', width=390, has_touch=True, is_mobile=True)
    page.locator('summary').click()
    assert page.evaluate('document.documentElement.scrollWidth')<=390
    wide = page.evaluate('''[...document.querySelectorAll('#wc-explorer *')].filter(e => !e.closest('.wc-scroll, .wc-list, .wc-box, .wc-hidden') && e.getBoundingClientRect().right>390.5).map(e => e.outerHTML.slice(0, 80))''')
    assert not wide
    small = page.evaluate('''[...document.querySelectorAll('#wc-explorer :is(select, input, .wc-turn)')].map(e => e.getBoundingClientRect()).filter(r => r.height && r.height<18).length''')
    assert small==0

def test_every_control_has_a_name(single, show):
    page = show(single)
    names = page.evaluate('''[...document.querySelectorAll('#wc-explorer :is(select, input, button, summary)')].map(e => [e.outerHTML.slice(0, 60), e.ariaLabel || e.labels?.[0]?.textContent || e.textContent])''')
    assert len(names)>40 and not [e for e,n in names if not n.strip()]
    assert page.evaluate('[...document.querySelectorAll("#wc-explorer img")].every(e => e.hasAttribute("alt"))')

# ---- page and folder

def test_a_page_asks_for_nothing(single, show):
    page = show(single)
    assert [u for u in show.asked if not u.startswith(('data:','blob:'))]==[single.as_uri()]
    assert "connect-src 'none'" in page.locator('meta[http-equiv]').get_attribute('content')
    assert page.evaluate('fetch("https://example.org/").then(() => "through", () => "refused")')=='refused'
    assert any('Content Security Policy' in t or 'Refused' in t or 'CSP' in t for t in show.said)
    show.said.clear(); show.asked.clear()

def test_what_is_left_out_is_said(opened, show, tmp_path):
    page = show(write_explorer(opened, tmp_path/'small.html', limit=.01).path, '#model=tiny-clip&tier=full&head=1')
    name = state(page)['photo']
    text = page.locator('.wc-missing').inner_text()
    assert 'not in this page' in text and f"{opened.values(RUN, head='1')[name]:.4f}" in text and 'folder' in text and 'Left out: those of every third block before it' in page.locator('footer').inner_text()
    page.keyboard.press('<'); page.keyboard.press('<'); settled(page)
    assert state(page)['head']=='mean' and numbers(page)[1]==opened.values(RUN)[name]

@contextmanager
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

def test_a_folder_loads_what_is_asked_for(opened, single, show, tmp_path):
    index = write_explorer_folder(opened, tmp_path/'with blank').path
    with served(tmp_path) as address:
        page = show(address+'/with%20blank/', '#model=tiny-clip&tier=full')
        loaded = {u.rpartition('/')[2] for u in show.asked}
        assert 'run6.mean3' in loaded and not any('heads' in u or 'mean0' in u for u in loaded)
        page.locator('[data-cell="0 1"]').click(); settled(page)
        assert {u.rpartition('/')[2] for u in show.asked}-loaded=={'run0.heads0','run6.heads0'}
        name = state(page)['photo']
        assert numbers(page)[1]==opened.values(RUN, block=0, head='1')[name]
        (index.parent/'data'/'run6.mean1').unlink()
        page.locator('[data-cell="1 mean"]').click(); settled(page)
        assert 'run6.mean1 could not be loaded (404)' in page.locator('.wc-status').inner_text()
        page.locator('[data-cell="3 mean"]').click(); settled(page)
        assert page.locator('.wc-status').inner_text()=='' and numbers(page)[1]==opened.values(RUN)[name]
    assert len(show.said)==1 and '404' in show.said.pop()

def test_a_folder_opened_as_a_file_says_what_it_needs(opened, show, tmp_path):
    page = show(write_explorer_folder(opened, tmp_path/'folder').path)
    assert 'through a web server' in page.locator('.wc-status').inner_text()
    show.said.clear() # the browser's own complaints

def test_start_of_a_control_and_odd_names(finished, show, tmp_path):
    "A run with a start of its own stands beside that; what comes from files is text, never markup."
    root = Path(shutil.copytree(finished, tmp_path/'brief'))
    for a,b in (('maps.safetensors','start.safetensors'), ('metrics.parquet','start.parquet')): shutil.copy(root/'tiny-siglip-frozen'/a, root/'tiny-siglip-lora-seed0'/b)
    opened = open_study(root)
    entries = explorer_entries(opened)
    lora = next(i for i,e in enumerate(entries) if (e.model,e.tier)==('tiny-siglip','lora'))
    assert entries[entries[lora].before].start and entries[entries[lora].before].tier=='its own start'
    text = write_explorer(opened, tmp_path/'e.html').path.read_text(encoding='utf-8')
    title = json.dumps(explorer_study(opened)['photos'][0]['title'])
    assert title in text
    (page := tmp_path/'odd.html').write_text(text.replace(title, json.dumps('</script><img src=x onerror=alert(1)>').replace('<', '\\u003c')), encoding='utf-8')
    page = show(page, '#model=tiny-siglip&tier=lora')
    assert page.locator('figure').first.get_attribute('data-pane')=='its own start' and page.locator('img[src=x]').count()==0

def test_command(finished, tmp_path, capsys):
    wikichurches_explore(str(finished), out=str(tmp_path/'a.html'), limit=.01)
    said = capsys.readouterr().out
    assert (tmp_path/'a.html').is_file() and 'a.html (' in said and 'Left out' in said
    wikichurches_explore(str(finished), folder=True, out=str(tmp_path/'all'))
    assert (tmp_path/'all'/'index.html').is_file() and 'Nothing is left out' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='run the study first'): wikichurches_explore(str(tmp_path))
