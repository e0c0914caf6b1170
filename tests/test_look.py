"One look: the same type and colors everywhere, and colors that people with any kind of color vision can tell apart."
from itertools import combinations
from pathlib import Path
import matplotlib as mpl, numpy as np, pytest
from colorspacious import cspace_convert
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from ssl_wikichurches.attention.plots import HOUSE, MODEL_COLORS
from ssl_wikichurches.finetune.tiers import CONTROLS, TIERS
from ssl_wikichurches.study.figures import CONTROL_COLOR, ON_DARK, PAGE_COLORS, TIER_COLORS, css_variables, theme_colors, tier_color

ROOT = Path(__file__).parent.parent
EYES = None,'protanomaly','deuteranomaly','tritanomaly' # Machado, Oliveira and Fernandes 2009, at full severity: a kind of cone is missing

def seen(color, kind):
    "Where a color lies in CAM02-UCS, whose unit can just be seen."
    rgb = to_rgb(color)
    if kind: rgb = cspace_convert(rgb, dict(name='sRGB1+CVD', cvd_type=kind, severity=100), 'sRGB1').clip(0, 1)
    return cspace_convert(rgb, 'sRGB1', 'CAM02-UCS')

def nearest(colors, kind): return min((np.linalg.norm(seen(a, kind)-seen(b, kind)), a, b) for a,b in combinations(colors, 2))

def contrast(a, b):
    "WCAG 2: 1 for the same color, 21 for black on white."
    rgb = np.array([to_rgb(a), to_rgb(b)])
    low,high = sorted(np.where(rgb<=.04045, rgb/12.92, ((rgb+.055)/1.055)**2.4)@[.2126,.7152,.0722])
    return (high+.05)/(low+.05)

@pytest.mark.parametrize('kind', EYES)
@pytest.mark.parametrize('ground', ('light','dark'))
@pytest.mark.parametrize('colors', (MODEL_COLORS,TIER_COLORS), ids=('models','tiers'))
def test_colors_can_be_told_apart_by_all_eyes(colors, ground, kind):
    shown = [ON_DARK.get(c, c) if ground=='dark' else c for c in colors.values()]
    distance,a,b = nearest(shown, kind)
    assert distance>10, f'{a} and {b}, {kind or "all cones"}, {ground}'

def test_the_check_sees_red_and_green():
    assert nearest(['#FF0000','#00FF00'], None)[0]>60 and nearest(['#D7191C','#1A9641'], 'deuteranomaly')[0]<nearest(['#D7191C','#1A9641'], None)[0]/3
    assert contrast('#000000', '#FFFFFF')==pytest.approx(21)

@pytest.mark.parametrize('ground', (0,1), ids=('light','dark'))
def test_text_can_be_read(ground):
    page = {k:pair[ground] for k,pair in PAGE_COLORS.items()}
    for text in ('ink','muted','accent'):
        for under in ('paper','panel'): assert contrast(page[text], page[under])>=4.5, (text, under)
    assert contrast(page['ink'], page['warn'])>=4.5
    for name,pair in theme_colors().items(): # marks on dark ground are seen; on light ground, the pale ones have a marker and a name
        if name.startswith(('model','tier')): assert contrast(pair[ground], page['paper'])>=(3 if ground else 1.5), name

def test_every_tier_has_one_color_and_controls_are_pale():
    assert len({*TIER_COLORS.values()})==len(TIERS)+1 and {*TIER_COLORS.values()}&{*MODEL_COLORS.values()}=={'#000000'} # frozen, and the supervised reference
    assert tier_color('lora-r4')==TIER_COLORS['lora'] and {tier_color(f'{c}-lora') for c in CONTROLS}=={CONTROL_COLOR}
    assert css_variables().count('light-dark(')==len(theme_colors())

def test_notebooks_and_package_have_one_look():
    assert (ROOT/'nbs'/'matplotlibrc').read_text()==(ROOT/'ssl_wikichurches'/'templates'/'house.mplstyle').read_text()
    with plt.style.context(HOUSE):
        assert mpl.rcParams['font.size']==9 and mpl.rcParams['svg.fonttype']=='none'
        assert to_rgb(mpl.rcParams['text.color'])==to_rgb(PAGE_COLORS['ink'][0])
