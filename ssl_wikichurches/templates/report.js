'use strict'
const all = (selector, under=document) => [...under.querySelectorAll(selector)]
const raw = cell => cell.dataset.v ?? cell.textContent

function sort(head) { // by the values of a column: numbers as numbers, empty cells last
  const table = head.closest('table'), column = head.cellIndex, body = table.tBodies[0]
  const down = head.getAttribute('aria-sort') === 'ascending'
  const value = row => { const text = raw(row.cells[column]); return text === '' ? null : isNaN(text) ? text : Number(text) }
  const order = (a, b) => a === null || b === null ? (a === null) - (b === null)
    : (typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b))) * (down ? -1 : 1)
  const rows = [...body.rows].map((row, i) => [value(row), i, row]).sort((a, b) => order(a[0], b[0]) || a[1] - b[1])
  body.append(...rows.map(r => r[2]))
  all('th', table).forEach(h => h.setAttribute('aria-sort', h === head ? (down ? 'descending' : 'ascending') : 'none'))
}

const quoted = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text
const csv = table => all('tr', table).map(row => [...row.cells].map(c => quoted(raw(c))).join(',')).join('\n') + '\n'

async function copy(button) { // rows as they are sorted, values that are not rounded
  const text = csv(button.closest('details').querySelector('table')), status = button.nextElementSibling
  try { await navigator.clipboard.writeText(text) }
  catch { // a page that is opened as a file may not have a clipboard
    const area = document.body.appendChild(Object.assign(document.createElement('textarea'), {value: text}))
    area.select(); document.execCommand('copy'); area.remove()
  }
  status.textContent = ' copied'
  setTimeout(() => { status.textContent = '' }, 3000)
}

function show() { // the section that the address names
  const part = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)))?.querySelector('details.part')
  if (part) { part.open = true; part.scrollIntoView() }
}

all('th button').forEach(b => b.addEventListener('click', () => sort(b.closest('th'))))
all('.copy').forEach(b => b.addEventListener('click', () => copy(b)))
addEventListener('hashchange', show)
addEventListener('beforeprint', () => all('details.part').forEach(d => { d.open = true }))
document.getElementById('all').addEventListener('click', e => {
  const open = e.currentTarget.getAttribute('aria-pressed') !== 'true'
  all('details.part').forEach(d => { d.open = open })
  e.currentTarget.setAttribute('aria-pressed', open)
  e.currentTarget.textContent = open ? 'Close all' : 'Open all'
})
document.getElementById('theme').addEventListener('click', () => {
  const dark = (document.documentElement.style.colorScheme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark'
  document.documentElement.style.colorScheme = dark ? 'light' : 'dark'
})
show()
