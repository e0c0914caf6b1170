"""What does it cost to read a study of real size: the former way, metric by metric from long tables, and `open_study`?

    python benchmarks/study.py [--folder FOLDER] [--models 6] [--seeds 5] [--images 139] [--variants 12] [--pooling 0]
    python benchmarks/study.py --workers # runs per minute of a small study by one worker and by two, and nothing else

The study is made up. Three real runs of each tiny backbone are trained on drawn churches; their scores, maps and features are enlarged to the size of a ViT-B
(12 blocks, 12 heads and their mean, every metric, 14 x 14 patches, 768 features) and disturbed at random, and copied to 6 models x 10 tiers x 5 seeds and a
frozen run for each model: 306 runs. Means over heads differ from run to run; of the large files there are only so many `variants`, to which the runs are
linked, so that a disk of some gigabytes will do. `--pooling` models have one map, of a pooling head, and what its 12 blocks receive. What is read is as long as it would be, and no number in it means anything.

Both ways run on the same folder in one go. `old` reads one metric as it was done before: `pd.read_parquet` with filters, run by run, from a long table with
all metrics in one group of rows. `new` opens the study, computes the tables of the headline (what `wikichurches_study` prints), and then all tables of a
report. Seconds and the peak memory of a fresh process are printed, and those of `wikichurches_study --dry-run`. A folder that was made is used again.
"""
import argparse, json, os, resource, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, torch
from safetensors.torch import save_file

PLAIN = ('linear','lora','full','lp_ft','core_tuning','coin','block_expansion','semi_supervised')
TIERS = (*PLAIN,'random_labels','other_task')
BLOCKS,HEADS,GRID,SIZE,DIM = 12,12,14,224,768

def small_study(folder, images, backbones):
    "Three real runs of each backbone, which lend their files."
    from ssl_wikichurches.data.synthetic import make_churches
    from ssl_wikichurches.study.plan import Study
    from ssl_wikichurches.study.runs import run_study
    data = make_churches(folder/'data', n=images+120, n_annotated=images, size=SIZE, seed=1)
    recipes = dict(linear=dict(epochs=1), full=dict(epochs=1, batch=64))
    study = Study('few', data=str(data), models=backbones, tiers=('linear','full'), val=.3, recipes=recipes)
    with ThreadPoolExecutor(1) as pool: return study,run_study(study, folder, pool, device='cpu', progress=False)

def larger_scores(path, rng, blocks=BLOCKS):
    "A long table of real scores, with as many blocks and heads as a ViT-B, disturbed."
    table = pd.read_parquet(path).sort_values('metric', kind='stable')
    mean = table[(table['head']=='mean')&(table.block==table.block.max())]
    heads = [*map(str, range(HEADS)),'mean']
    out = mean.loc[mean.index.repeat(blocks*len(heads))].reset_index(drop=True)
    out['block'],out['head'] = np.tile(np.repeat(np.arange(blocks), len(heads)), len(mean)),np.tile(heads, blocks*len(mean))
    return out.assign(value=out.value+.02*out.value.abs().mean()*rng.normal(size=len(out)))

def write_variant(folder, run, rng, pooling):
    "The large files of a made-up run."
    from ssl_wikichurches.study.runs import RECEIVED, write_by_metric
    folder.mkdir(parents=True)
    blocks,received = (1,BLOCKS) if pooling else (BLOCKS,0)
    scores = larger_scores(run/'metrics.parquet', rng, blocks)
    if pooling: write_by_metric(folder/RECEIVED, larger_scores(run/'metrics.parquet', rng).query("metric=='iou@90'")[['image','block','head','metric','value']])
    write_by_metric(folder/'metrics.parquet', scores)
    scores.sort_values(['image','block','head'], kind='stable').to_parquet(folder/'old.parquet', index=False) # as it was: image by image, one group of rows
    from safetensors import safe_open
    with safe_open(run/'maps.safetensors', 'pt') as f: texts,n = f.metadata(),len(json.loads(f.metadata()['images']))
    header = json.loads(texts['header'])|dict(size=SIZE, patch=SIZE//GRID, n_prefix=1)
    noise = lambda *shape: torch.from_numpy(rng.random(shape, np.float32)).half()
    maps = dict(maps=noise(n,blocks,HEADS,GRID,GRID), prefix=noise(n,blocks,HEADS,1), received=noise(n,received,HEADS,GRID,GRID),
                artifacts=torch.zeros(n,GRID,GRID, dtype=torch.bool))
    save_file(maps, folder/'maps.safetensors', texts|dict(header=json.dumps(header)))
    with safe_open(run/'features.safetensors', 'pt') as f: features,texts = {k:f.get_tensor(k) for k in f.keys()},f.metadata()
    for k in ('features','task'): features[k] = torch.from_numpy(rng.normal(size=(len(features[k]),DIM)).astype(np.float32))
    save_file(features, folder/'features.safetensors', texts)

def disturbed_means(table, rng, by):
    "Means over heads of another run: values moved, levels as they are."
    values = [c for c in table if c not in ('image','block') and '|' not in c]
    return table.assign(**{c:table[c]+by*table[c].abs().mean()*rng.normal(size=len(table)) for c in values})

def make(folder, args):
    "The made-up study."
    from ssl_wikichurches.study.plan import Study, study_runs
    from ssl_wikichurches.study.runs import mean_table
    of = {f'm{k}':'tiny-siglip' if k<args.pooling else 'tiny-clip' for k in range(args.models)}
    few,real = small_study(folder, args.images, (*dict.fromkeys(of.values()),))
    variants,rng = {b:[folder/'variants'/b/str(k) for k in range(args.variants)] for b in few.models},np.random.default_rng(0)
    for b,some in variants.items():
        for v in some: write_variant(v, real/f'{b}-full-seed0', rng, b=='tiny-siglip')
    start = {b:mean_table(pd.read_parquet(some[0]/'metrics.parquet')) for b,some in variants.items()}
    study = Study('large', data=few.data, models=tuple(f'{m}={b}' for m,b in of.items()), tiers=TIERS, seeds=tuple(range(args.seeds)), val=.3)
    root = folder/'large'
    root.mkdir()
    (root/'study.json').write_text(json.dumps(asdict(study)))
    for f in ('split.json','duplicates.csv','problems.csv','images.csv'): os.link(real/f, root/f)
    frozen = {m:disturbed_means(start[b], rng, .02) for m,b in of.items()}
    for k,r in enumerate(study_runs(study, '')):
        b = of[r.model]
        source,target,variant = real/f"{b}-{'frozen' if r.tier=='frozen' else 'full-seed0'}",root/r.name,variants[b][k%args.variants]
        target.mkdir()
        facts = json.loads((source/'run.json').read_text())|asdict(r)
        facts['spec'] |= dict(size=SIZE, patch=SIZE//GRID)
        (target/'recipe.json').write_text(json.dumps(asdict(r))); (target/'run.json').write_text(json.dumps(facts))
        for f in variant.iterdir(): os.link(f, target/f.name)
        if r.tier!='frozen': os.link(source/'predictions.csv', target/'predictions.csv')
        same = r.tier in ('frozen','linear')
        (frozen[r.model] if same else disturbed_means(frozen[r.model], rng, .02)).to_parquet(target/'means.parquet', index=False)
    return root

def old_scores(root, metric, limit=None):
    "One metric of all runs, as it was read before."
    folders = sorted(p.parent for p in root.glob('*/run.json'))[:limit]
    for f in folders:
        d = pd.read_parquet(f/'old.parquet', filters=[('metric','==',metric),('head','==','mean')])
        d[d.block==d.block.max()].set_index('image').value
    return len(folders)

def timed(what, f):
    start,own = time.perf_counter(),time.process_time()
    out = f()
    print(f'{what:<66}{time.perf_counter()-start:7.2f} s, {time.process_time()-own:7.2f} of the processor', flush=True)
    return out

def new(root):
    "Everything, in this process."
    from ssl_wikichurches.study.analysis import analyse
    from ssl_wikichurches.study.reader import open_study
    from ssl_wikichurches.study.specificity import control_contrasts, readable_result, verdict_table
    from ssl_wikichurches.study.supervision import supervised_table
    from ssl_wikichurches.study.tables import study_table, tier_contrasts
    import sklearn.neighbors # with the next line, all modules are loaded before the clock starts
    open_study(root)
    def headline():
        opened = open_study(root)
        readable_result(study_table(opened), verdict_table(opened))
        return opened,control_contrasts(opened),tier_contrasts(opened),supervised_table(opened)
    opened = timed('new: opened', lambda: open_study(root))
    timed('new: one metric of all runs', opened.scores)
    timed('new: opened, with all tables of the headline', headline)
    analysis = timed('new: opened, with all tables of a report, written', lambda: analyse(open_study(root)))
    print(f'{len(opened.runs)} runs, {len(analysis.tables)} tables; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.2f} GB')

def dry_run(root):
    "What a start would do, as a shell asks for it: with the start of Python."
    from ssl_wikichurches.study.plan import read_study
    study = read_study(root)
    fields = dict(name=study.name, data=study.data, models=study.models, tiers=study.tiers, seeds=study.seeds, val=study.val)
    (file := root.with_suffix('.toml')).write_text(''.join(f'{k} = {json.dumps(v)}\n' for k,v in fields.items()))
    command = [str(Path(sys.executable).with_name('wikichurches_study')), str(file), '--runs', str(root.parent), '--dry-run']
    said = timed('wikichurches_study --dry-run', lambda: subprocess.run(command, capture_output=True, text=True))
    print('\n'.join(said.stdout.splitlines()[-2:]) or said.stderr)

def throughput(folder):
    "The same runs by one worker and by two, each with one thread; a first worker has loaded all there is to load."
    from ssl_wikichurches.data.synthetic import make_churches
    from ssl_wikichurches.study.plan import Study
    from ssl_wikichurches.study.runs import default_executor, run_study
    data,took = make_churches(folder/'photographs', n=120, n_annotated=24, size=96, seed=1),{}
    for n in (1,2):
        study = lambda name, **kw: Study(f'{name}{n}', data=str(data), models=('tiny-clip','tiny-siglip'), val=.3, **kw)
        with default_executor(n, threads=1) as pool:
            run_study(study('first', tiers=('lora',), recipes=dict(lora=dict(epochs=1))), folder, pool, device='cpu', progress=False)
            took[n] = timed(f'{n} worker{"s" if n>1 else ""}: 14 runs', lambda: seconds_of(lambda: run_study(study('timed', seeds=(0,1), recipes=dict(lora=dict(epochs=4), full=dict(epochs=4))), folder, pool, device='cpu', progress=False)))
    print(f'throughput of two workers against one: {took[1]/took[2]:.2f}')

def seconds_of(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--folder'); p.add_argument('--reads', action='store_true', help=argparse.SUPPRESS)
    for name,value in dict(models=6, seeds=5, images=139, variants=12, pooling=0).items(): p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--workers', action='store_true')
    args = p.parse_args()
    if args.workers:
        with tempfile.TemporaryDirectory() as tmp: return throughput(Path(tmp))
    if args.reads: return new(Path(args.folder))
    home = None if args.folder else tempfile.TemporaryDirectory()
    folder = Path(args.folder or home.name)
    folder.mkdir(parents=True, exist_ok=True)
    root = folder/'large'
    if not root.is_dir():
        print('a made-up study: enlarged and disturbed copies of three real runs of each tiny backbone on drawn churches')
        timed('made', lambda: make(folder, args))
    timed(f'old: one metric of all runs', lambda: old_scores(root, 'iou@90'))
    subprocess.run([sys.executable, __file__, '--folder', str(root), '--reads'], check=True)
    dry_run(root)

if __name__=='__main__': main()
