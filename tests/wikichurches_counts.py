"A folder that counts like WikiChurches: what is known of its numbers, with made-up churches and photographs of one pixel."
import io, json
import numpy as np
from PIL import Image
from ssl_wikichurches.data.churches import STYLES

LEAF = (1517,1520,171,1380) # photographs of churches with exactly one of the four styles, without the annotated ones
TAGS = (54,49,22,17) # of the 139 annotated images; three carry two
TWO = 3
VARIETIES = 2691 # churches of a style below one of the four; 108 of them with a second photograph
OTHERS = 1928 # churches of no use here; 31 of them with a second photograph

def _churches():
    "Q-ids of the styles of every church: annotated, other leaf churches, varieties, others."
    four = [*STYLES]
    annotated = [s for s,n in zip(four, np.subtract(TAGS, (TWO,0,0,0))) for _ in range(n)]
    leaf = [s for s,n in zip(four, LEAF) for _ in range(n)]
    varieties = [f'Q{10+i%4}' for i in range(VARIETIES)]
    others = [('Q100',), (), tuple(four[:2])]
    return [[s] for s in (*annotated,*leaf,*varieties)]+[list(others[i%3]) for i in range(OTHERS)]

def write_counted(root):
    "The folder, complete; photographs are one black pixel, all with the same bytes."
    (root/'images').mkdir(parents=True); (root/'labels').mkdir()
    styles = _churches()
    ids = [f'Q{500_000+i}' for i in range(len(styles))]
    first_variety = 139+sum(LEAF); first_other = first_variety+VARIETIES
    second = {*range(first_variety, first_variety+108), *range(first_other, first_other+31)}
    Image.new('RGB', (1,1)).save(buffer := io.BytesIO(), 'JPEG')
    names = [(i,f'{q}_wd{k}.jpg') for i,q in enumerate(ids) for k in range(1+(i in second))]
    for _,n in names: (root/'images'/n).write_bytes(buffer.getvalue())
    (root/'churches.json').write_text(json.dumps({q:dict(id=q, name=f'Church {q}', styles=s, built_year=None) for q,s in zip(ids, styles)}))
    more = {f'Q{10+i}':f'A variety of {n}' for i,n in enumerate(STYLES.values())} | {f'Q{100+i}':f'Style {i}' for i in range(121-8)}
    (root/'style_names.txt').write_text('\n'.join(f'{q} {n}' for q,n in {**STYLES,**more}.items()))
    (root/'parent_child_rel.txt').write_text('\n'.join(f'{s} Q{10+i}' for i,s in enumerate(STYLES)))
    _write_boxes(root, ids, styles)
    _write_lists(root, styles, names, first_other)
    return root

def _write_boxes(root, ids, styles):
    box = lambda k: dict(label=0, left=.1+k/10, top=.1, width=.1, height=.08)
    tags = [s+[[*STYLES][0]]*(i>=139-TWO) for i,s in enumerate(styles[:139])] # three carry a second tag
    groups = [[dict(group_label=0, elements=[box(k) for k in range(5 if i<75 else 4)])] for i in range(139)] # 631 boxes
    meta = [dict(name=f'Part {i}', parents=[]) for i in range(106)]
    annotations = {f'{q}_wd0.jpg':dict(styles=t, bbox_groups=g) for q,t,g in zip(ids, tags, groups)}
    (root/'building_parts.json').write_text(json.dumps(dict(meta=meta, annotations=annotations)))

def _write_lists(root, styles, names, first_other):
    "5,838 / 206 / 1,482 photographs of 5,750 / 199 / 1,469 churches; of the annotated ones 97 in the first two, 42 in the third."
    top = lambda s: s if s in STYLES else [*STYLES][int(s[1:])-10]
    listed = [(i,n) for i,n in names if i<first_other]
    double = [*range(139+sum(LEAF), 139+sum(LEAF)+108)] # with a second photograph
    single = [i for i in range(first_other) if i not in set(double)]
    part = dict.fromkeys(single[:90], 'train') | dict.fromkeys(single[90:97], 'val') | dict.fromkeys(single[97:139], 'test')
    part |= dict.fromkeys(double[:88], 'train') | dict.fromkeys(double[88:95], 'val') | dict.fromkeys(double[95:], 'test')
    rest = iter(single[139:])
    for p,n in (('train',5750-90-88), ('val',199-7-7), ('test',1469-42-13)): part |= {next(rest):p for _ in range(n)}
    for p in ('train','val','test'):
        (root/f'labels/wc4_{p}.txt').write_text('\n'.join(f'{n} {top(styles[i][0])}' for i,n in listed if part[i]==p))
