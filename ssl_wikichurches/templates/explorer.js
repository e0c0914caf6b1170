// The explorer of a study: photographs, boxes, maps, and what a percentile keeps of them.
// One module for a page (`page`) and for a widget in JupyterLab (the default export); nothing is loaded from elsewhere.

// ---- numbers: the arithmetic of PyTorch in single precision, so that the same pixels are kept and the same IoU comes out

const f32 = Math.fround
const UNIT = 2**-24 // every half-precision number between 0 and 1 is a multiple of it

function taps(g, size, fused) { // of each pixel: the two cells that it lies between, and their weights
  const at = []
  for (let i = 0; i<size; i++) {
    if (g===size) { at.push([i, i, 1, 0]); continue }
    const scale = f32(g/size), x = Math.max(0, fused ? f32(scale*(i+.5)-.5) : f32(f32(scale*(i+.5))-.5))
    const a = Math.min(Math.floor(x), g-1), w = Math.min(f32(x-a), 1)
    at.push([a, Math.min(a+1, g-1), f32(1-w), w])
  }
  return at
}

export function upsample(map, g, size, fused=true) { // bilinear, as on a processor with fused multiplication and addition, or without
  const mix = fused ? (a, u, b, v) => f32(a*u+f32(b*v)) : (a, u, b, v) => f32(f32(a*u)+f32(b*v))
  const add = fused ? (t, a, u) => f32(a*u+t) : (t, a, u) => f32(f32(a*u)+t)
  const at = taps(g, size, fused), out = new Float32Array(size*size)
  if (size<=64) { // small frames go through another routine there: four products, one after the other
    for (let y = 0; y<size; y++) for (let x = 0; x<size; x++) {
      const [r, s, u, v] = at[y], [c, d, p, q] = at[x]
      let t = fused ? f32(map[r*g+d]*f32(u*q)) : f32(map[r*g+c]*f32(u*p))
      t = fused ? add(t, map[r*g+c], f32(u*p)) : add(t, map[r*g+d], f32(u*q))
      out[y*size+x] = add(add(t, map[s*g+c], f32(v*p)), map[s*g+d], f32(v*q))
    }
    return out
  }
  const rows = Array.from({length: g}, (_, r) => Float32Array.from(at, ([a, b, u, v]) => mix(map[r*g+a], u, map[r*g+b], v)))
  for (let y = 0; y<size; y++) {
    const [a, b, u, v] = at[y]
    for (let x = 0; x<size; x++) out[y*size+x] = mix(rows[a][x], u, rows[b][x], v)
  }
  return out
}

export function nKept(n, q) { // round half to even, as Python does
  const x = n*(100-q)/100, low = Math.floor(x)
  return x-low===.5 ? low+low%2 : Math.round(x)
}

export function keep(values, sorted, k) { // the k largest; of equal values the earlier in reading order
  const n = values.length, limit = sorted[n-k], mask = new Uint8Array(n)
  let left = k
  for (let i = 0; i<n; i++) if (values[i]>limit) { mask[i] = 1; left-- }
  for (let i = 0; left; i++) if (values[i]===limit) { mask[i] = 1; left-- }
  return mask
}

export function boxMask(boxes, size) { // pixels whose center lies inside at least one box
  const mask = new Uint8Array(size*size)
  const inside = (i, a, b) => i+.5>=a && i+.5<b
  for (const [x0, y0, x1, y1] of boxes)
    for (let y = 0; y<size; y++) if (inside(y, y0, y1)) for (let x = 0; x<size; x++) if (inside(x, x0, x1)) mask[y*size+x] = 1
  return mask
}

const count = (mask, other) => mask.reduce((t, m, i) => t+(m && (!other || other[i]) ? 1 : 0), 0)
export const iou = (hits, k, area) => hits/(k+area-hits)

const logs = [0] // logarithms of factorials
export function chance(area, n, k) { // expected IoU of k pixels drawn at random, by the hypergeometric distribution
  for (let i = logs.length; i<=n; i++) logs.push(logs[i-1]+Math.log(i))
  const choose = (a, b) => logs[a]-logs[b]-logs[a-b], whole = choose(n, k)
  let sum = 0
  for (let x = Math.max(0, k+area-n); x<=Math.min(k, area); x++) sum += Math.exp(choose(area, x)+choose(n-area, k-x)-whole)*iou(x, k, area)
  return sum
}

function half(bits) { // a half-precision number
  const e = bits>>10&31, m = bits&1023
  return (bits&0x8000 ? -1 : 1)*(e ? (1+m/1024)*2**(e-15) : m*UNIT)
}

async function planes(bytes, width) { // whole numbers whose bytes stand in planes, the lowest first, deflated
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))
  const flat = new Uint8Array(await new Response(stream).arrayBuffer()), n = flat.length/width
  return Uint32Array.from({length: n}, (_, i) => { let t = 0; for (let b = width; b--;) t = t*256+flat[b*n+i]; return t })
}

// ---- what a study holds

class Recent { // what was made last
  constructor(most) { Object.assign(this, {most, made: new Map()}) }
  once(key, make) {
    const found = this.made.has(key) ? this.made.get(key) : make()
    this.made.delete(key); this.made.set(key, found)
    if (this.made.size>this.most) this.made.delete(this.made.keys().next().value)
    return found
  }
}

class Store { // reads its files when they are asked for, and keeps the last of what was made of them
  constructor(study, source) { Object.assign(this, {study, source, files: new Recent(120), drawn: new Recent(60), targets: new Recent(1000)}) }
  name(file) { return this.study.same[file] ?? file }
  has(file) { return this.source.has(this.name(file)) }
  ints(file, width) {
    const name = this.name(file)
    const made = this.files.once(name, async () => planes(await this.source.get(name), width))
    made.catch(() => this.files.made.delete(name)) // to be tried again
    return made
  }
  file(run, block, head) { return `run${run}.${head==='mean' ? 'mean' : 'heads'}${block}` }
  place(run, photo) { return this.study.models[this.study.runs[run].model].photos.indexOf(photo) }
  async map(run, photo, block, head) { // share of the attention of each patch
    const {grid, heads} = this.study.models[this.study.runs[run].model], n = grid*grid, at = this.place(run, photo)
    if (head==='mean') return Float32Array.from((await this.ints(this.file(run, block, head), 4)).subarray(at*n, at*n+n), s => f32(s*UNIT/heads))
    const from = (at*heads+Number(head))*n
    return Float32Array.from((await this.ints(this.file(run, block, head), 2)).subarray(from, from+n), half)
  }
  target(model, photo) { // the boxes as pixels
    const {size} = this.study.models[model]
    return this.targets.once(`${size} ${photo}`, () => { const mask = boxMask(this.study.boxes[size][photo], size); return {mask, area: count(mask)} })
  }
  async pixels(run, photo, block, head) { // the map in pixels, and in order; by the arithmetic that gives the table's number
    const map = await this.map(run, photo, block, head)
    return this.drawn.once(`${run} ${photo} ${block} ${head}`, async () => {
      const model = this.study.runs[run].model, {grid, size} = this.study.models[model], {mask, area} = this.target(model, photo)
      const stored = await this.value(run, photo, block, head), k = nKept(size*size, this.study.q)
      const by = fused => {
        const values = upsample(map, grid, size, fused), sorted = values.slice().sort()
        return {map, values, sorted, stored, agrees: iou(count(keep(values, sorted, k), mask), k, area)===stored}
      }
      const first = by(true), other = first.agrees ? first : by(false)
      return other.agrees ? other : first
    })
  }
  async measure(run, photo, block, head, q) { // what a percentile keeps of a map, and its IoU
    const found = await this.pixels(run, photo, block, head), model = this.study.runs[run].model, {size} = this.study.models[model]
    const {mask, area} = this.target(model, photo), k = nKept(size*size, q), kept = keep(found.values, found.sorted, k)
    return {...found, kept, iou: iou(count(kept, mask), k, area), differs: q===this.study.q && !found.agrees}
  }
  hits(run) { return this.ints(`run${run}.hits`, 4) }
  async value(run, photo, block, head) { // IoU of the table, at its own percentile; undefined where it has none
    return this.valueOf(run, await this.hits(run), photo, block, head)
  }
  valueOf(run, hits, photo, block, head) {
    const model = this.study.runs[run].model, {heads, blocks, size} = this.study.models[model], at = this.place(run, photo)
    if (at<0) return undefined
    const h = hits[(at*blocks+block)*(heads+1)+(head==='mean' ? heads : Number(head))]
    return h===0xffffffff ? undefined : iou(h, nKept(size*size, this.study.q), this.target(model, photo).area)
  }
}

// ---- small parts of a page

function h(tag, attributes={}, ...children) {
  const svg = ['svg', 'path', 'circle', 'title'].includes(tag), e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) {
    if (k.startsWith('on')) e.addEventListener(k.slice(2), v)
    else if (v!==null && v!==false && v!==undefined) e.setAttribute(k, v===true ? '' : v)
  }
  e.append(...children.filter(c => c!==null && c!==undefined))
  return e
}

const signed = (x, digits=4) => x===undefined ? '–' : (x>=0 ? '+' : '−')+Math.abs(x).toFixed(digits)
const plain = (x, digits=4) => x===undefined ? '–' : x.toFixed(digits)
const digits = x => Math.max(1, Math.min(6, 1-Math.floor(Math.log10(x)))) // after the point, for two that say something
const rgb = ([r, g, b]) => `rgb(${r} ${g} ${b})`
const color = (scale, x) => scale[Math.max(0, Math.min(255, Math.floor(x*256)))] // x in [0, 1]

function quantile(values, p) {
  const v = Float64Array.from(values).sort(), at = p*(v.length-1), low = Math.floor(at)
  return v[low]+(v[Math.min(low+1, v.length-1)]-v[low])*(at-low)
}

function outline(mask, size) { // the border of a region, as a path along the edges of pixels
  const inside = (x, y) => x>=0 && y>=0 && x<size && y<size && mask[y*size+x]
  let d = ''
  for (const across of [true, false]) for (let line = 0; line<=size; line++) {
    let from = -1
    for (let i = 0; i<=size; i++) {
      const edge = i<size && (across ? inside(i, line-1)!==inside(i, line) : inside(line-1, i)!==inside(line, i))
      if (edge && from<0) from = i
      if (!edge && from>=0) { d += across ? `M${from} ${line}H${i}` : `M${line} ${from}V${i}`; from = -1 }
    }
  }
  return d
}

function paint(canvas, size, values, scale, low, high) {
  canvas.width = canvas.height = size
  const context = canvas.getContext('2d'), image = context.createImageData(size, size), span = high-low || 1
  values.forEach((v, i) => { const c = color(scale, (v-low)/span); image.data.set([c[0], c[1], c[2], 255], 4*i) })
  context.putImageData(image, 0, 0)
}

// ---- the state: all that an address remembers

const DEFAULTS = {photo: '', model: '', tier: '', seed: '', block: '', head: 'mean', q: '90', opacity: '65', beside: '', boxes: '1', kept: '1',
                  sort: 'gain', style: '', part: '', cells: 'difference', over: 'photograph'}
const SORTS = {gain: 'largest gain first', loss: 'largest loss first', frozen: 'highest before', tuned: 'highest after', name: 'name'}
const CELLS = ['before', 'after', 'difference']

class Explorer {
  constructor(root, study, source, start={}, changed=() => {}) {
    Object.assign(this, {root, study, changed, store: new Store(study, source), source, turn: 0, urls: new Map()})
    root.explorer = this
    this.state = this.valid({...DEFAULTS, ...start})
    this.build()
    this.ready = this.update()
  }

  // what can be chosen, and the choice nearest to what was asked for
  get tuned() { return this.study.runs.map((r, i) => ({...r, i})).filter(r => r.before!==null) }
  get models() { return Object.keys(this.study.models).filter(m => this.tiers(m).length) }
  tiers(model) { return [...new Set(this.tuned.filter(r => r.model===model).map(r => r.tier))] }
  seeds(model, tier) { return this.tuned.filter(r => r.model===model && r.tier===tier).map(r => String(r.seed)) }
  valid(s) {
    const one = (v, all, other=all[0]) => all.includes(v) ? v : other
    const number = (v, low, high, other) => { const x = Math.round(Number(v)); return String(v!=='' && x>=low && x<=high ? x : other) }
    const {models} = this
    s.model = one(s.model, models); s.beside = one(s.beside, models.filter(m => m!==s.model), '')
    const {blocks, heads} = this.study.models[s.model], tiers = this.tiers(s.model)
    s.tier = one(s.tier, tiers, tiers.includes('full') ? 'full' : tiers[0]); s.seed = one(s.seed, this.seeds(s.model, s.tier))
    s.block = number(s.block, 0, blocks-1, blocks-1)
    if (s.head!=='mean') s.head = number(s.head, 0, heads-1, 'mean')
    s.q = number(s.q, 50, 99, this.study.q); s.opacity = number(s.opacity, 0, 100, 65)
    s.sort = one(s.sort, Object.keys(SORTS)); s.cells = one(s.cells, CELLS, 'difference'); s.over = one(s.over, ['photograph', 'gallery'])
    s.boxes = s.boxes==='0' ? '0' : '1'; s.kept = s.kept==='0' ? '0' : '1'
    s.style = one(s.style, this.styles, ''); s.part = one(s.part, this.parts, '')
    return s
  }
  get styles() { return [...new Set(this.study.photos.flatMap(p => p.styles))].sort() }
  get parts() { return [...new Set(this.study.photos.flatMap(p => p.parts))].sort() }
  shown(model) { // the runs, block and head of a row: those that were chosen, or their nearest kin in another model
    const s = this.state, own = model===s.model, runs = this.tuned.filter(r => r.model===model)
    const same = runs.filter(r => r.tier===s.tier), run = same.find(r => String(r.seed)===s.seed) ?? same[0]
    if (!run) return null
    const {blocks, heads} = this.study.models[model], last = Number(s.block)===this.study.models[s.model].blocks-1
    const block = own ? Number(s.block) : last ? blocks-1 : Math.min(Number(s.block), blocks-1)
    return {model, run, block, head: s.head!=='mean' && Number(s.head)>=heads ? 'mean' : s.head}
  }

  set(change) { this.state = this.valid({...this.state, ...change}); this.changed(this.state); return this.ready = this.update() }

  // ---- the page, built once
  build() {
    const {study} = this
    this.root.classList.add('wc-explorer'); this.root.replaceChildren()
    this.inputs = {}
    this.status = h('p', {class: 'wc-status', role: 'status'})
    this.view = h('div', {class: 'wc-rows'})
    this.about = h('div', {}); this.live = h('p', {class: 'wc-hidden', 'aria-live': 'polite'})
    const turn = (by, sign, label) => h('button', {type: 'button', class: 'wc-turn', 'aria-label': label, onclick: () => this.set(this.neighbor(by))}, sign)
    this.grid = h('table', {class: 'wc-grid', role: 'grid', 'aria-label': 'blocks and heads', onkeydown: e => this.walk(e)})
    this.readout = h('p', {class: 'wc-readout', 'aria-live': 'polite'})
    this.list = h('ul', {class: 'wc-list', onkeydown: e => this.step(e)})
    this.tally = h('p', {class: 'wc-tally', role: 'status'})
    this.root.append(
      h('header', {class: 'wc-top'}, h('h1', {}, study.title), h('p', {}, study.subtitle)),
      h('div', {class: 'wc-controls', role: 'group', 'aria-label': 'what is shown'},
        this.select('model', 'Model'), this.select('tier', 'Tier'), this.select('seed', 'Seed'), this.select('block', 'Block'),
        this.select('head', 'Head'), this.select('beside', 'Beside it'),
        this.slider('q', 'Percentile', 50, 99), this.slider('opacity', 'Opacity', 0, 100, ' %'),
        this.box('boxes', 'boxes'), this.box('kept', 'kept region')),
      this.status,
      h('div', {class: 'wc-main'},
        h('section', {'aria-label': 'maps'}, h('div', {class: 'wc-about'}, turn(-1, '‹', 'photograph before'), turn(1, '›', 'next photograph'), this.about), this.view, this.live),
        h('section', {'aria-label': 'blocks and heads', class: 'wc-side'}, h('h2', {}, 'Blocks and heads'),
          h('div', {class: 'wc-controls'}, this.select('cells', 'IoU'), this.select('over', 'of')),
          h('div', {class: 'wc-scroll'}, this.grid), this.readout)),
      h('section', {'aria-label': 'gallery'}, h('h2', {}, 'Photographs'),
        h('div', {class: 'wc-controls'}, this.select('sort', 'Order'), this.select('style', 'Style'), this.select('part', 'Part')),
        this.tally, this.list),
      h('footer', {}, this.keys(), h('p', {}, `${study.note} ${study.holds}`)))
    this.root.addEventListener('keydown', e => this.key(e))
    this.eyes = new IntersectionObserver(seen => seen.filter(e => e.isIntersecting).forEach(e => {
      this.eyes.unobserve(e.target)
      this.url(Number(e.target.dataset.photo)).then(u => { e.target.src = u })
    }), {rootMargin: '200px'})
  }
  select(key, label) {
    const e = h('select', {'data-key': key, onchange: () => this.set({[key]: e.value})})
    this.inputs[key] = e
    return h('label', {}, h('span', {}, label), e)
  }
  slider(key, label, min, max, unit='') {
    const said = h('span', {}), e = h('input', {type: 'range', min, max, step: 1, 'data-key': key, oninput: () => this.set({[key]: e.value})})
    e.said = said; e.unit = unit; this.inputs[key] = e
    return h('label', {class: 'wc-slider'}, h('span', {}, label, ' ', said), e)
  }
  box(key, label) {
    const e = h('input', {type: 'checkbox', 'data-key': key, onchange: () => this.set({[key]: e.checked ? '1' : '0'})})
    this.inputs[key] = e
    return h('label', {class: 'wc-check'}, e, h('span', {}, label))
  }
  keys() {
    const rows = [['← →', 'photograph before, after'], ['− +', 'block before, after'], ['< >', 'head before, after'], ['[ ]', 'percentile, in steps of 5'], ['m t s', 'next model, tier, seed'],
                  ['b k', 'boxes, kept region'], ['Tab', 'to every control; inside the grid and the gallery arrows move, Enter chooses']]
    return h('details', {}, h('summary', {}, 'Keys'), h('dl', {}, ...rows.flatMap(([k, t]) => [h('dt', {}, k), h('dd', {}, t)])))
  }

  // ---- drawing
  fill(key, options, said=o => o, all) {
    const e = this.inputs[key], pairs = [...(all===undefined ? [] : [['', all]]), ...options.map(o => [o, said(o)])]
    if (e.made!==JSON.stringify(pairs)) { e.replaceChildren(...pairs.map(([v, t]) => h('option', {value: v}, t))); e.made = JSON.stringify(pairs) }
    e.value = this.state[key]; e.disabled = pairs.length<2
  }
  fillAll() {
    const s = this.state, {models} = this, {blocks, heads, rows} = this.study.models[s.model]
    const up = n => Array.from({length: n}, (_, i) => String(i))
    this.fill('model', models); this.fill('tier', this.tiers(s.model)); this.fill('seed', this.seeds(s.model, s.tier))
    this.fill('block', up(blocks), b => rows==='pooling head' ? rows : Number(b)===blocks-1 ? `${b} (last)` : b)
    this.fill('head', ['mean', ...up(heads)], o => o==='mean' ? 'mean of heads' : o)
    this.fill('beside', models.filter(m => m!==s.model), o => o, 'no other model')
    this.fill('cells', CELLS); this.fill('over', ['photograph', 'gallery'], o => o==='gallery' ? 'the gallery, on average' : 'this photograph')
    this.fill('sort', Object.keys(SORTS), o => SORTS[o]); this.fill('style', this.styles, o => o, 'all'); this.fill('part', this.parts, o => o, 'all')
    for (const k of ['q', 'opacity']) { const e = this.inputs[k]; e.value = s[k]; e.said.textContent = s[k]+e.unit; e.setAttribute('aria-valuetext', s[k]+e.unit) }
    for (const k of ['boxes', 'kept']) this.inputs[k].checked = s[k]==='1'
  }
  async update() {
    const turn = ++this.turn, late = () => turn!==this.turn
    this.fillAll()
    this.root.setAttribute('aria-busy', 'true')
    try {
      await this.gallery(late); if (late()) return
      await this.rows(late); if (late()) return
      await this.cells(late); if (late()) return
      this.status.textContent = ''
    } catch (e) {
      if (late()) return
      this.status.textContent = e.message
    }
    this.root.setAttribute('aria-busy', 'false')
  }
  url(photo) {
    if (!this.urls.has(photo)) this.urls.set(photo, this.source.photo(photo))
    return this.urls.get(photo)
  }
  get photo() { return this.study.photos.findIndex(p => p.name===this.state.photo) }

  async rows(late) {
    const s = this.state, rows = [s.model, s.beside].filter(Boolean).map(m => [m, this.shown(m)])
    const found = await Promise.all(rows.map(([, shown]) => shown && this.row(shown)))
    const url = await this.url(this.photo); if (late()) return
    const key = JSON.stringify([rows, s.photo, s.boxes, s.part, found.map(f => Boolean(f?.before))])
    if (key!==this.rowsKey) {
      this.rowsKey = key
      const ends = this.ends(found.filter(f => f?.before)), focused = this.focused()
      this.drawn = rows.map(([m, shown], i) => this.drawRow(m, shown, found[i], ends, url, i))
      this.view.replaceChildren(...this.drawn.map(d => d.row))
      this.refocus(focused)
      this.describe()
    }
    this.drawn.forEach((d, i) => d.dress?.(found[i]))
    this.live.textContent = this.drawn.map(d => d.said).filter(Boolean).join('; ')
  }
  ends(found) { // of one scale for all maps, and one for all differences; as multiples of an even share
    const all = found.flatMap(r => [...r.before.map, ...r.after.map].map(v => v*r.even))
    const change = found.flatMap(r => Array.from(r.after.map, (v, i) => Math.abs(v-r.before.map[i])*r.even))
    return all.length ? {low: Math.min(...all), high: quantile(all, .98), most: quantile(change, .98) || 1e-12} : null
  }
  async row({model, run, block, head}) {
    const p = this.photo, q = Number(this.state.q), {size, grid} = this.study.models[model], pair = [run.before, run.i], k = nKept(size*size, q)
    if (this.store.place(run.i, p)<0) return {why: `${model} did not measure this photograph.`}
    if (!pair.every(r => this.store.has(this.store.file(r, block, head)))) return {
      why: `The maps of this ${head==='mean' ? 'block' : 'head'} are not in this page: ${this.study.left_out}`,
      stored: await Promise.all(pair.map(r => this.store.value(r, p, block, head)))}
    const {area} = this.store.target(model, p), [before, after] = await Promise.all(pair.map(r => this.store.measure(r, p, block, head, q)))
    return {before, after, even: grid*grid, chance: chance(area, size*size, k), ceiling: Math.min(k, area)/Math.max(k, area)}
  }
  drawRow(model, shown, found, ends, url, index) {
    const {study} = this, {size, color, rows} = study.models[model], run = shown?.run
    const where = shown && `${rows==='pooling head' ? rows : `block ${shown.block}`}, ${shown.head==='mean' ? 'mean of heads' : `head ${shown.head}`}`
    const title = h('h2', {}, h('span', {class: 'wc-dot', style: `background:${color}`, 'aria-hidden': 'true'}), run ? `${model}, ${run.tier}, seed ${run.seed}` : model,
      h('small', {}, where ? ` ${where}` : ''))
    const curve = shown && this.curve(model, run.tier)
    const only = text => ({row: h('article', {class: 'wc-row'}, title, h('p', {class: 'wc-missing'}, text), curve), said: text})
    if (!shown) return only(`${model} has no runs of ${this.state.tier}.`)
    if (!found.before) return only(found.why+(found.stored ? ` Their IoU at percentile ${study.q}: ${found.stored.map(v => plain(v)).join(' before, ')} after.` : ''))
    const [a, b] = [found.before, found.after].map(m => m.values.map(v => v*found.even)), d = b.map((v, i) => v-a[i])
    const heat = [study.scales.heat, ends.low, ends.high], names = [study.runs[run.before].label, run.tier, 'difference']
    const colors = [study.runs[run.before].color, run.color, null]
    const panes = [[a, ...heat], [b, ...heat], [d, study.scales.difference, -ends.most, ends.most]].map((how, i) => this.pane(names[i], colors[i], how, model, url, index+i===0))
    const levels = h('p', {})
    const row = h('article', {class: 'wc-row'}, title, h('div', {class: 'wc-panes'}, ...panes.map(p => p.figure), h('div', {class: 'wc-levels'}, levels,
      this.bar(study.scales.heat, plain(ends.low, 1), plain(ends.high, 1), 'share of attention, 1: even'),
      this.bar(study.scales.difference, signed(-ends.most, digits(ends.most)), signed(ends.most, digits(ends.most)), 'difference of shares'))), curve)
    const drawn = {row, dress: now => {
      const of = m => m.differs ? `${plain(m.iou)} (table: ${plain(m.stored)}; its processor rounded otherwise)` : plain(m.iou), gain = now.after.iou-now.before.iou
      const paths = [now.before, now.after].map(m => outline(m.kept, size))
      panes[0].dress(now.before.iou, of(now.before), [[paths[0], false]])
      panes[1].dress(now.after.iou, of(now.after), [[paths[1], false]])
      panes[2].dress(gain, signed(gain), [[paths[0], true], [paths[1], false]])
      levels.textContent = `IoU at percentile ${this.state.q}; chance ${plain(now.chance)}, ceiling ${plain(now.ceiling)}`
      drawn.said = `${model}, IoU at percentile ${this.state.q}: ${names[0]} ${plain(now.before.iou)}, ${names[1]} ${plain(now.after.iou)}, difference ${signed(gain)}`
    }}
    return drawn
  }
  curve(model, tier) { // the shift at every look at a training, accuracy behind it; nothing where nobody looked
    const found = this.study.curves.find(c => c.model===model && c.tier===tier); if (!found) return null
    const {looks, sentence} = found, width = 300, height = 90, edge = 8, first = looks[1]?.[0], last = looks.at(-1)[0] || 1, log = last>20*first
    const far = log ? e => e<=first ? .4*e/first : .4+Math.log10(e/first) : e => e // as in the figure of the report
    const least = Math.min(...looks.map(l => l[1])), most = Math.max(...looks.map(l => l[1])), room = most-least // an interval may leave the picture
    const low = Math.max(least-room, Math.min(least, ...looks.map(l => l[2] ?? least))), high = Math.min(most+room, Math.max(most, ...looks.map(l => l[3] ?? most)))
    const x = e => edge+(width-2*edge)*far(e)/far(last), up = share => height-edge-(height-2*edge)*share, y = s => up((s-low)/(high-low || 1))
    const line = points => 'M'+points.map(p => p.join(' ')).join('L'), sure = looks.filter(([, , a, b]) => a!==null && b!==null)
    const band = [...sure.map(([e, , a]) => [x(e), y(a)]), ...sure.map(([e, , , b]) => [x(e), y(b)]).reverse()]
    const said = looks.map(([e, s, a, b, v]) => `epoch ${+e.toFixed(2)}: shift ${signed(s)}${a===null ? '' : ` (95 %: ${signed(a)} to ${signed(b)})`}, balanced accuracy ${plain(v ?? undefined, 3)}`)
    const legend = `Shift of IoU at percentile ${this.study.q} while it trained (line, with its 95 % interval; from ${signed(low)} to ${signed(high)}) and balanced accuracy on validation (dashed; from 0 to 1) against the epoch (0 to ${+last.toFixed(2)}${log ? ', on a scale of logarithms' : ''}).`
    const svg = h('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${legend} ${said.join('; ')}`, style: `color:${this.study.models[model].color}`},
      h('path', {d: line([[x(0), y(0)], [x(last), y(0)]]), class: 'wc-zero'}), sure.length ? h('path', {d: line(band)+'Z', class: 'wc-band'}) : null,
      h('path', {d: line(looks.map(([e, , , , v]) => [x(e), up(v)])), class: 'wc-learned'}), h('path', {d: line(looks.map(([e, s]) => [x(e), y(s)])), class: 'wc-moved'}),
      ...looks.map(([e, s], i) => h('circle', {cx: x(e), cy: y(s), r: 3.5}, h('title', {}, said[i]))))
    return h('figure', {class: 'wc-curve'}, svg, h('figcaption', {}, h('p', {}, sentence), h('p', {}, legend)))
  }
  bar(scale, low, high, label) {
    const stops = Array.from({length: 17}, (_, i) => rgb(color(scale, i/16))).join(',')
    return h('div', {class: 'wc-bar', role: 'img', 'aria-label': `${label}: ${low} to ${high}`},
      h('b', {}, label), h('span', {}, low), h('i', {style: `background:linear-gradient(90deg,${stops})`}), h('span', {}, high))
  }
  pane(name, color, how, model, url, first) {
    const {size} = this.study.models[model], p = this.study.photos[this.photo], canvas = h('canvas', {'aria-hidden': 'true'})
    paint(canvas, size, ...how)
    const svg = h('svg', {viewBox: `0 0 ${size} ${size}`, preserveAspectRatio: 'none', 'aria-hidden': 'true'}), said = h('span', {class: 'wc-iou'})
    const image = h('img', {src: url, alt: `${p.title} (${p.styles.join(', ')})`})
    const stage = h('div', {class: 'wc-stage', style: `aspect-ratio:${p.aspect}`, role: 'group', 'aria-label': `${name}: ${p.title}`},
      image, canvas, svg, ...this.boxes(p, model, size, first))
    const figure = h('figure', {'data-pane': name}, stage, h('figcaption', {}, h('span', {}, color && h('i', {class: 'wc-tier', style: `background:${color}`, 'aria-hidden': 'true'}), name), said))
    const dress = (value, text, lines) => {
      said.textContent = text; said.dataset.value = value
      canvas.style.opacity = this.state.opacity/100; image.style.filter = this.state.opacity==='0' ? 'none' : ''
      svg.replaceChildren(...(this.state.kept==='1' ? lines : []).flatMap(([d, dashed]) => ['wc-under', 'wc-over'].map(c => h('path', {d, class: c+(dashed ? ' wc-dashed' : '')}))))
    }
    return {figure, dress}
  }
  boxes(p, model, size, first) {
    if (this.state.boxes!=='1') return []
    const share = x => `${100*x/size}%`
    return this.study.boxes[size][this.photo].map(([x0, y0, x1, y1], i) => h('div', {
      class: 'wc-box'+(this.state.part===p.parts[i] ? ' wc-chosen' : '')+(y0<.15*size ? ' wc-below' : '')+(x0>.5*size ? ' wc-left' : ''), 'data-box': i, 'data-part': p.parts[i],
      role: first ? 'img' : null, 'aria-label': first ? `box: ${p.parts[i]}` : null, tabindex: first ? 0 : null,
      style: `left:${share(x0)};top:${share(y0)};width:${share(x1-x0)};height:${share(y1-y0)}`,
      onmouseenter: () => this.light(i, true), onmouseleave: () => this.light(i, false), onfocus: () => this.light(i, true), onblur: () => this.light(i, false)}))
  }
  light(i, on) { this.view.querySelectorAll(`[data-box="${i}"]`).forEach(e => e.classList.toggle('wc-lit', on)) }
  describe() {
    const p = this.study.photos[this.photo]
    this.about.replaceChildren(h('p', {}, h('strong', {}, p.title), ` ${p.styles.join(', ')}; ${p.parts.length} boxes`, h('small', {}, ` ${p.name}`)),
      ...(p.credit ? [h('p', {class: 'wc-credit'}, p.credit)] : []))
  }

  // ---- blocks and heads
  async cells(late) {
    const s = this.shown(this.state.model), {run} = s, {blocks, heads, rows} = this.study.models[s.model]
    const [before, after] = await Promise.all([run.before, run.i].map(r => this.store.hits(r))); if (late()) return
    const photos = this.state.over==='gallery' ? this.order : [this.photo], names = ['mean', ...Array.from({length: heads}, (_, i) => String(i))]
    const mean = all => { const v = all.filter(x => x!==undefined); return v.length ? v.reduce((a, b) => a+b, 0)/v.length : undefined }
    const value = (b, n) => {
      const both = photos.map(p => [this.store.valueOf(run.before, before, p, b, n), this.store.valueOf(run.i, after, p, b, n)])
      return mean(both.map(([x, y]) => this.state.cells==='before' ? x : this.state.cells==='after' ? y : x===undefined || y===undefined ? undefined : y-x))
    }
    const values = Array.from({length: blocks}, (_, b) => names.map(n => value(b, n)))
    const most = Math.max(1e-12, ...values.flat().filter(v => v!==undefined).map(Math.abs)), difference = this.state.cells==='difference'
    const shade = v => v===undefined ? 'transparent' : rgb(difference ? color(this.study.scales.difference, .5+v/most/2) : color(this.study.scales.heat, v/most))
    const said = v => difference ? signed(v) : plain(v)
    const at = `${s.block} ${s.head}`, focused = this.focused(), key = JSON.stringify([s.model, values, at, this.state.cells, this.order.length])
    if (key===this.cellsKey) return
    this.cellsKey = key
    const cell = (b, n, v) => h('td', {role: 'gridcell', 'aria-selected': `${b} ${n}`===at ? 'true' : 'false'}, h('button', {
      type: 'button', 'data-cell': `${b} ${n}`, tabindex: `${b} ${n}`===at ? 0 : -1, style: `background:${shade(v)}`,
      'aria-label': `${rows==='pooling head' ? rows : `block ${b}`}, ${n==='mean' ? 'mean of heads' : `head ${n}`}: ${said(v)}`,
      onclick: () => this.set({block: String(b), head: n}), onmouseenter: e => this.read(e.target), onfocus: e => this.read(e.target)}))
    this.grid.replaceChildren(
      h('tr', {role: 'row'}, h('th', {role: 'columnheader'}, 'block'), ...names.map(n => h('th', {role: 'columnheader', scope: 'col'}, n))),
      ...values.map((row, b) => h('tr', {role: 'row'}, h('th', {role: 'rowheader', scope: 'row'}, rows==='pooling head' ? 'head' : b), ...row.map((v, i) => cell(b, names[i], v)))))
    this.refocus(focused)
    this.read(this.grid.querySelector(`[data-cell="${at}"]`))
  }
  read(cell) {
    const of = this.state.over==='gallery' ? `mean of ${this.order.length} photographs` : 'this photograph'
    this.readout.textContent = `${cell.getAttribute('aria-label')} (IoU at percentile ${this.study.q}, ${this.state.cells}, ${of})`
  }
  walk(e) { // arrows in the grid
    const at = e.target.dataset?.cell; if (!at) return
    const [b, n] = at.split(' '), {blocks, heads} = this.study.models[this.state.model], names = ['mean', ...Array.from({length: heads}, (_, i) => String(i))]
    const by = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key]; if (!by) return
    e.preventDefault(); e.stopPropagation()
    const to = [Math.max(0, Math.min(blocks-1, Number(b)+by[0])), names[Math.max(0, Math.min(heads, names.indexOf(n)+by[1]))]].join(' ')
    this.grid.querySelector(`[data-cell="${to}"]`).focus()
  }

  // ---- the gallery
  async gallery(late) {
    const s = this.shown(this.state.model), [before, after] = await Promise.all([s.run.before, s.run.i].map(r => this.store.hits(r))); if (late()) return
    const all = this.study.photos.map((p, i) => {
      const [x, y] = [[s.run.before, before], [s.run.i, after]].map(([r, hits]) => this.store.valueOf(r, hits, i, s.block, s.head))
      return {i, p, before: x, after: y, gain: x===undefined || y===undefined ? undefined : y-x}
    }).filter(({p}) => (!this.state.style || p.styles.includes(this.state.style)) && (!this.state.part || p.parts.includes(this.state.part)))
    const by = {gain: o => -o.gain, loss: o => o.gain, frozen: o => -o.before, tuned: o => -o.after}[this.state.sort]
    if (by) all.sort((a, b) => (a.gain===undefined)-(b.gain===undefined) || by(a)-by(b) || a.i-b.i)
    this.order = all.map(o => o.i)
    if (!this.order.includes(this.photo)) { this.state.photo = this.study.photos[this.order[0] ?? 0].name; this.changed(this.state) }
    const key = JSON.stringify([this.order, all.map(o => o.gain)])
    if (key!==this.galleryKey) {
      this.galleryKey = key
      const focused = this.focused()
      this.list.replaceChildren(...all.map(({i, p, gain, before, after}) => h('li', {}, h('button', {type: 'button', 'data-item': i, title: p.title,
        'aria-label': `${p.title}, ${p.styles.join(' and ')}: ${signed(gain)} (${plain(before)} before, ${plain(after)} after)`, onclick: () => this.set({photo: p.name})},
        h('img', {alt: '', 'data-photo': i, style: `aspect-ratio:${p.aspect};width:min(100%, ${88*p.aspect}px)`}), h('span', {}, signed(gain, 3))))))
      this.list.querySelectorAll('img').forEach(e => this.eyes.observe(e))
      this.refocus(focused)
      this.tally.textContent = `${all.length} of ${this.study.photos.length} photographs; below each, the change of its IoU at percentile ${this.study.q} in this block and head`
    }
    for (const b of this.list.querySelectorAll('button')) {
      const chosen = Number(b.dataset.item)===this.photo
      b.tabIndex = chosen ? 0 : -1
      if (chosen) b.setAttribute('aria-current', 'true'); else b.removeAttribute('aria-current')
    }
  }
  step(e) { // arrows in the gallery
    const by = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[e.key], items = [...this.list.querySelectorAll('button')]
    if (by===undefined || !items.includes(e.target)) return
    e.preventDefault(); e.stopPropagation()
    items[Math.max(0, Math.min(items.length-1, items.indexOf(e.target)+by))].focus()
  }

  // ---- keys, and the focus that survives drawing
  key(e) {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.matches('select, input[type=range]')) return
    const s = this.state, next = (v, all, by=1) => all[(all.indexOf(v)+by+all.length)%all.length], {blocks, heads} = this.study.models[s.model]
    const up = n => Array.from({length: n}, (_, i) => String(i)), photo = by => this.neighbor(by)
    const change = {
      ArrowLeft: () => photo(-1), ArrowRight: () => photo(1), '-': () => ({block: next(s.block, up(blocks), -1)}), '+': () => ({block: next(s.block, up(blocks))}),
      '<': () => ({head: next(s.head, ['mean', ...up(heads)], -1)}), '>': () => ({head: next(s.head, ['mean', ...up(heads)])}),
      '[': () => ({q: String(Math.max(50, Number(s.q)-5))}), ']': () => ({q: String(Math.min(99, Number(s.q)+5))}),
      m: () => ({model: next(s.model, this.models)}), t: () => ({tier: next(s.tier, this.tiers(s.model))}),
      s: () => ({seed: next(s.seed, this.seeds(s.model, s.tier))}), b: () => ({boxes: s.boxes==='1' ? '0' : '1'}), k: () => ({kept: s.kept==='1' ? '0' : '1'}),
    }[e.key]
    if (!change) return
    e.preventDefault(); e.stopPropagation(); this.set(change())
  }
  neighbor(by) { // the photograph before or after this one in the gallery
    const n = this.order.length, at = this.order.indexOf(this.photo)
    return n ? {photo: this.study.photos[this.order[(at+by+n)%n]].name} : {}
  }
  focused() { const d = this.root.getRootNode().activeElement?.dataset ?? {}; return ['cell', 'item', 'box'].filter(k => k in d).map(k => `[data-${k}="${d[k]}"]`)[0] }
  refocus(at) { if (at) this.root.querySelector(at)?.focus({preventScroll: true}) }
}

// ---- a page: the state is its address

export function page() {
  const root = document.getElementById('wc-explorer'), study = JSON.parse(document.getElementById('wc-study').textContent)
  const inside = new Map([...document.querySelectorAll('script[data-file]')].map(e => [e.dataset.file, e]))
  const address = name => `${study.folder}/${encodeURIComponent(name)}`
  const source = {
    has: name => inside.has(name) || Boolean(study.folder),
    async get(name) {
      if (inside.has(name)) return Uint8Array.from(atob(inside.get(name).textContent), c => c.charCodeAt(0))
      const answer = await fetch(address(name)).catch(() => { throw new Error('The maps could not be loaded: this folder is to be opened through a web server, not as a file.') })
      if (!answer.ok) throw new Error(`${name} could not be loaded (${answer.status}): was the folder copied whole?`)
      return new Uint8Array(await answer.arrayBuffer())
    },
    photo: async i => inside.has(`photo${i}.jpg`) ? 'data:image/jpeg;base64,'+inside.get(`photo${i}.jpg`).textContent : address(`photo${i}.jpg`),
  }
  const read = () => Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([k]) => k in DEFAULTS))
  const write = s => history.replaceState(null, '', '#'+new URLSearchParams(s))
  const view = new Explorer(root, study, source, read(), write)
  addEventListener('hashchange', () => view.set({...DEFAULTS, ...read()}))
  document.addEventListener('keydown', e => { if (e.target===document.body) view.key(e) })
  return view
}

// ---- a widget: the state is a trait, files come from the kernel

function render({model, el}) {
  const waiting = new Map(), study = model.get('study')
  const answer = ({name, error}, buffers) => {
    const [done, fail] = waiting.get(name) ?? []; waiting.delete(name)
    if (error) fail?.(new Error(error)); else { const b = buffers[0]; done?.(new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength)) }
  }
  model.on('msg:custom', answer)
  const source = {
    has: () => true,
    get: name => new Promise((done, fail) => { waiting.set(name, [done, fail]); model.send({get: name}) }),
    photo: async i => URL.createObjectURL(new Blob([await source.get(`photo${i}.jpg`)], {type: 'image/jpeg'})),
  }
  const root = el.appendChild(document.createElement('div'))
  root.addEventListener('focusin', e => { e.target.dataset.lmSuppressShortcuts = 'true' }) // JupyterLab, which asks the element with the focus, leaves its keys alone
  const write = s => { if (JSON.stringify(s)!==JSON.stringify(model.get('state'))) { model.set('state', s); model.save_changes() } }
  const view = new Explorer(root, study, source, model.get('state'), write)
  const follow = () => { if (JSON.stringify(model.get('state'))!==JSON.stringify(view.state)) view.set({...DEFAULTS, ...model.get('state')}) }
  model.on('change:state', follow)
  return () => {
    model.off('msg:custom', answer); model.off('change:state', follow)
    for (const u of view.urls.values()) u.then(URL.revokeObjectURL, () => {})
  }
}

export default {render}
