"A study that takes seconds: two tiny models, three tiers, small photographs."
from concurrent.futures import ThreadPoolExecutor
from ssl_wikichurches.study.plan import Study
from ssl_wikichurches.study.runs import run_study

BRIEF = dict(linear=dict(epochs=2), lora=dict(epochs=1, lr=1e-2), full=dict(epochs=1, backbone_lr=1e-3))

def brief(folder, **changes):
    return Study(**dict(name='brief', data=str(folder), models=('tiny-clip','tiny-siglip'), size=64, val=.3, recipes=BRIEF)|changes)

def here(study, runs, **kwargs):
    with ThreadPoolExecutor(1) as pool: return run_study(study, runs, pool, device='cpu', progress=False, **kwargs)
