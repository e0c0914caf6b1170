"""How long does it take to read large photographs for a 224-pixel model: plainly, at a reduced scale, and from prepared copies?

    python benchmarks/loading.py            # 200 photographs of 12 to 40 megapixels; 2 GB in a temporary folder, some minutes
    python benchmarks/loading.py --n 8

The three ways take turns on every photograph, in one process with one thread. Differences are to the plain way, in gray levels of 255."""
import argparse, io, json, struct, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torchvision.transforms.v2 import Compose
from torchvision.transforms.v2 import functional as VF
from ssl_wikichurches.data.churches import STYLES, ChurchDataset, eval_transform, read_churches
from ssl_wikichurches.data.prepare import prepare, prepare_report
from ssl_wikichurches.data.synthetic import DRAWN_STYLES, draw_church

def masters(n, rng):
    "Large pictures: drawn churches, enlarged, with stone-like texture at several scales and grain."
    for i in range(n):
        im = draw_church(DRAWN_STYLES[i%4], (7,i), 1024)[0].resize((8192,8192), Image.Resampling.BICUBIC)
        a = np.asarray(im).astype(np.int16)
        for cell,strength in ((64,10), (16,10), (4,8), (1,7)): # coarse texture is enlarged, fine is drawn as it is
            t = Image.fromarray(rng.integers(0, 256, (8192//cell,8192//cell), dtype=np.uint8)).resize((8192,8192), Image.Resampling.BICUBIC)
            a += ((np.asarray(t).astype(np.int16)-128)*strength//64)[...,None]
        yield Image.fromarray(a.clip(0, 255).astype(np.uint8))

def make_photographs(root, n, seed=0):
    "A folder in the layout of WikiChurches with n photographs; every one is another part and size of one of five pictures."
    rng = np.random.default_rng(seed)
    (root/'images').mkdir(parents=True)
    kinds = min(5, n)
    for i,master in enumerate(masters(kinds, rng)):
        for k in range(i, n, kinds):
            mp,ratio = rng.uniform(12e6, 40e6), rng.choice([3/2, 4/3, 2/3, 3/4])
            w,h = round((mp*ratio)**.5), round((mp/ratio)**.5)
            x,y = rng.integers(0, 8193-w), rng.integers(0, 8193-h)
            master.crop((x, y, x+w, y+h)).save(root/'images'/f'Q{k+1}_wd0.jpg', quality=90)
    (root/'churches.json').write_text(json.dumps({f'Q{k+1}':dict(styles=['Q46261']) for k in range(n)}))
    (root/'building_parts.json').write_text(json.dumps(dict(meta=[], annotations={})))
    (root/'style_names.txt').write_text('\n'.join(f'{q} {s}' for q,s in STYLES.items()))

def plain(path, transform):
    "Decode all, convert all, then resize."
    with Image.open(path) as im: image = VF.to_dtype(VF.pil_to_tensor(im.convert('RGB')), torch.float32, scale=True)
    return transform(image).clamp(0, 1)

def long_jpeg(path, w=15008, blocks=625):
    "A JPEG of w x (16*blocks) pixels from strips: each row of blocks is a restart interval, so the picture is never held."
    rng,rows = np.random.default_rng(1), []
    for _ in range(24):
        out = io.BytesIO()
        strip = rng.normal(0, 12, (16,w,1))+np.linspace(0, 255, w)[None,:,None]
        Image.fromarray(np.broadcast_to(strip, (16,w,3)).clip(0, 255).astype(np.uint8)).save(out, 'JPEG', quality=90, restart_marker_rows=1)
        data = out.getvalue()
        sos = data.index(b'\xff\xda')
        start = sos+2+struct.unpack('>H', data[sos+2:sos+4])[0]
        rows.append(data[start:-2])
    head = bytearray(data[:start])
    sof = head.index(b'\xff\xc0')
    head[sof+5:sof+7] = struct.pack('>H', 16*blocks)
    with open(path, 'wb') as f:
        f.write(head)
        for i in range(blocks): f.write(rows[i%24]+(bytes([255,0xd0+i%8]) if i<blocks-1 else b'\xff\xd9'))

def peak_memory(path, side):
    "Largest memory of a fresh process that opens the picture, less that of one that opens nothing; MB and seconds."
    # VmHWM and not ru_maxrss, which starts from the memory of the process that started this one
    code = ("import re,sys,time; from ssl_wikichurches.data.codec import open_image; t = time.time(); side = int(sys.argv[2]) or None\n"
            "if sys.argv[1]: open_image(sys.argv[1], side)\n"
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024, time.time()-t)")
    run = lambda p: [float(v) for v in subprocess.run([sys.executable, '-c', code, p, str(side or 0)], capture_output=True, text=True, check=True).stdout.split()]
    (base,_),(used,seconds) = run(''), run(str(path))
    return used-base, seconds

def compare(churches, size=224):
    "Seconds by way and photograph; all differences of pixels to the plain way."
    transform,names = eval_transform(size), list(churches.images.index)
    ours = {w:ChurchDataset(churches, names, transform, prepared=w=='prepared') for w in ('reduced','prepared')}
    whole = Compose([transform])
    seconds,off = {w:[] for w in ('plain','reduced','prepared')}, {w:[] for w in ours}
    for i,n in enumerate(names):
        order = list(np.roll([*seconds], i)) # they take turns at being first
        churches.path(n).read_bytes() # in the page cache for all
        images = {}
        for w in order:
            start = time.perf_counter()
            images[w] = plain(churches.path(n), whole) if w=='plain' else ours[w][i]['image']
            seconds[w].append(time.perf_counter()-start)
        for w in ours: off[w].append((images[w]-images['plain']).abs().flatten().numpy()*255)
    return {w:np.array(s) for w,s in seconds.items()}, {w:np.concatenate(o) for w,o in off.items()}

def main(n, seed=0):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix='loading-') as tmp:
        root,start = Path(tmp)/'set', time.time()
        make_photographs(root, n, seed)
        size = sum(p.stat().st_size for p in (root/'images').iterdir())
        print(f'{n} photographs, {size/1e9:.2f} GB, made in {time.time()-start:.0f} s', flush=True)
        start = time.time()
        print(f'{prepare_report(prepare(root, workers=1, progress=False))}\nprepared in {time.time()-start:.0f} s by one process', flush=True)
        start = time.time()
        churches = read_churches(root)
        print(f'read_churches with the record: {time.time()-start:.2f} s', flush=True)
        seconds,off = compare(churches)
        base = seconds['plain']
        print(f"{'way':10}{'ms':>8}{'times faster':>14}{'(quartiles)':>16}{'mean off':>10}{'99.9 %':>8}{'max':>6}")
        for w,s in seconds.items():
            q = np.quantile(base/s, [.25,.75])
            o = off.get(w, np.zeros(1))
            print(f'{w:10}{s.mean()*1e3:8.1f}{base.sum()/s.sum():14.1f}{f"{q[0]:.1f} to {q[1]:.1f}":>16}{o.mean():10.2f}{np.quantile(o, .999):8.1f}{o.max():6.1f}')
        long_jpeg(Path(tmp)/'long.jpg')
        for side in (None, 224):
            mb,s = peak_memory(Path(tmp)/'long.jpg', side)
            print(f'150 megapixels, side={side}: {mb:.0f} MB more than without, {s:.2f} s')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=200, help='photographs (default 200)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.n<1: parser.error('--n must be at least 1')
    main(args.n, args.seed)
