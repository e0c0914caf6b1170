"Truth against verdict: what an interval says, how many seeds agree, what is right."
import numpy as np, pandas as pd, pytest
from pathlib import Path
from ssl_wikichurches.study.calibration import TRUTHS, _agreement, _halves, read_calibration, readable_calibration, word

RESULTS = Path(__file__).parents[1]/'results'/'calibration'
CLAIMS = ('towards','away')

@pytest.fixture(scope='module')
def table(): return read_calibration(RESULTS)

def test_a_word_is_a_side_of_zero():
    assert [word(*ends) for ends in ((.1,.2),(-.2,-.1),(-.1,.2),(0,.1))]==['towards','away','nothing','nothing']
    assert word(-.2, -.1, better=-1)=='towards' and word(np.nan, np.nan)=='nothing'

def test_agreement_counts_seeds_that_say_the_same():
    seeds = pd.DataFrame(dict(model='m', tier='t', seed=range(4), low=[.1,-.1,.1,-.3], high=[.2,.1,.3,-.2]))
    assert _agreement(seeds, {('m','t'):'towards'}, 1).item()==.5 and _agreement(seeds, {('m','t'):'away'}, 1).item()==.25
    assert _agreement(seeds, {('m','t'):'away'}, -1).item()==.5

def test_the_committed_table_says_of_itself_what_its_columns_say(table):
    assert {*table.world}<={*TRUTHS} and table.seeds.ge(5).all() and table.model.nunique()>=2
    for r in table.itertuples():
        assert r.says==word(r.low, r.high) and r.layout_says==word(r.layout_low, r.layout_high)
        assert r.claims==(r.verdict if r.verdict in CLAIMS else 'nothing') and r.right==(r.claims in TRUTHS[r.world])

def test_the_committed_seeds_agree_as_often_as_the_table_says(table):
    seeds = pd.read_csv(RESULTS/'seeds.csv')
    for own in ('','layout_'):
        for r in table.to_dict('records'):
            mine = seeds[(seeds.world==r['world'])&(seeds.model==r['model'])&(seeds.tier==r['tier'])&(seeds.metric==r[f'{own}metric'])]
            assert len(mine)==r['seeds'] and mine['shift'].mean()==pytest.approx(r[f'{own}shift'], abs=1e-8)
            assert np.mean([word(m.low, m.high)==r[f'{own}says'] for m in mine.itertuples()])==pytest.approx(r[f'{own}agree'])

def test_a_control_against_itself_is_nothing():
    splits = pd.read_csv(RESULTS/'splits.csv', keep_default_na=False)
    assert [*_halves(2, 4)]==[((0,1),(2,3)),((0,2),(1,3)),((0,3),(1,2))]
    for r in splits.itertuples():
        held = r.holds_zero*r.splits
        assert r.splits==len(_halves(r.k, 5 if r.world=='parts' else 10)) and held==pytest.approx(round(held), abs=1e-4)

def test_no_claim_is_wrong_and_the_pair_is_told_apart(table):
    claims = table[table.claims!='nothing']
    assert claims.right.all() and len(claims)
    pair = table[table.world.isin(('boxed','shortcut'))&table.says.ne('nothing')]
    assert (pair.says==pair.world.map({w:t[0] for w,t in TRUTHS.items()})).all() # no interval lies on the wrong side
    text = readable_calibration(table)
    assert len(text)==len(table) and text.accuracy.str.contains('before').all()
