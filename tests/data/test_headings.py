"""Headings of reports: every shape they come in, the side they name, and no word of a report lost."""
import re
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvl.data.samples.breast import BreastTextConfig, report_texts
from medvl.data.text.headings import SECTIONS, section_like, find_headings, section_of
from medvl.data.releases.mimic_cxr import judge_report
from medvl.data.text.mimic_sections import lovt_sections
from medvl.data.text.reports import no_report, normalise, normalise_section, split_sections
from medvl.data.text.sentences import report_sections, report_sentences

quick = settings(max_examples=200, deadline=None)
words_of = lambda text: Counter(re.findall(r'[^\W_]+', text))


def texts(report): return [(n, normalise_section(n, t)) for n, t in report_texts([report], BreastTextConfig())]


# every word in exactly one section, or in a named remainder
HEADS = ['FINAL REPORT\n', 'FINDINGS:', 'Impression:', 'LEFT BREAST FINDINGS:', 'RIGHT IMPRESSION:', 'Findings (left):', 'FINDINGS - RIGHT BREAST:', 'FINDINGS OF THE LEFT BREAST:', 'FINDINGS AND IMPRESSION:',
         'FINDINGS/IMPRESSION:', 'Assessment & Plan:', 'IMPRESSION AND PLAN OF CARE:', 'HISTORY:', 'TECHNIQUE :', 'Comparison (3/4/2019):', 'COMPARISON:', 'Indication:', 'INDICACIÓN:', 'HALLAZGOS:',
         'NDICATION:', 'Finidngs:', 'BI-RADS:', 'LEFT BI-RADS CATEGORY:', 'BI-RADS (RIGHT):', '2. FINDINGS:', '**Findings:**', '## Impression\n', '\nFINDINGS\n', 'IMPRESSION  ', 'Breast density:', 'THYROID FINDINGS:',
         'ADDENDUM:', 'ADDENDUM IMPRESSION:', 'HEART:', 'Signed by:', 'Other findings:', 'A) FINDINGS:', '| IMPRESSION |\n', 'FINDINGS：', 'Rt. breast findings:', 'FINDINGS –', 'recommendation(s):']
BODIES = ['No mass.', 'There is a 3.5 cm mass.', 'N/A', 'none', '-', 'nil.', 'Clear lungs', 'BI-RADS 4a.', '1. Stable.\n2. Benign', 'left', 'RIGHT BREAST', 'Screening', 'Both lungs remain clear.', 'See above', '**',
          '____', 'Dr. Smith agrees.', '10:30', 'a - b', 'naïve ®', 'prior study of 12.03.2019. No change.', 'Findings suggest nothing', 'in the', 'CT.']
GAPS = [' ', '\n', '\r\n', '\n\n', '  ', '\n \n', '\t', '\x0c', '\r']


@quick
@given(st.lists(st.tuples(st.sampled_from(HEADS + BODIES), st.sampled_from(GAPS)), max_size=12))
@example([('HISTORY:', ' '), ('Screening', '. '), ('There is a 3.5 cm mass.', '\n'), ('RIGHT IMPRESSION:', ' '), ('N/A', '')])
def test_every_word_is_in_one_place(parts):
    report = ''.join(a + gap for a, gap in parts)
    assert sum((words_of(t) for t in split_sections(report, rest=True).values()), Counter()) == words_of(report), report
    assert set(split_sections(report)) <= {*SECTIONS, 'preamble'}


@quick
@given(st.text(max_size=150) | st.text(alphabet='FINDGSIMPRO abc:.\n\r-*#()1&/', max_size=150))
def test_every_word_of_any_text(report):
    assert sum((words_of(t) for t in split_sections(report, rest=True).values()), Counter()) == words_of(report), report


@quick
@given(st.lists(st.sampled_from(['No mass.', 'Spiculated mass in the upper quadrant.', 'BI-RADS 5.', 'Dense.', 'Three clips']), min_size=1, max_size=4), st.sampled_from(HEADS[1:10]),
       st.sampled_from(['HISTORY: Screening.\n', 'TECHNIQUE: Two views.\n\n', '', 'COMPARISON: None. ', 'Indication: lump\n']))
def test_what_stands_under_findings_is_drawn(body, head, before):
    "Under each of these headings a text becomes a training text, whole and once, and no heading does."
    found = ' '.join(t for _, t in texts(f'{before}{head} {" ".join(body)}'))
    assert normalise(' '.join(body)).rstrip('.') in found and not re.search(r'\b(findings|impression|history|technique|comparison|indication|plan)\b', found), found
    assert ('left' in found) == ('left' in head.lower()) and ('right' in found) == ('right' in head.lower())


# sides
SIDED = {'FINDINGS: Dense tissue.\nLEFT IMPRESSION: BI-RADS 5.\nRIGHT IMPRESSION: BI-RADS 1.': [('findings', 'dense tissue.'), ('impression', 'left: bi-rads 5. right: bi-rads 1.')],
         'RIGHT BREAST FINDINGS: No mass.\nLEFT BREAST FINDINGS: Spiculated mass.\nIMPRESSION: BI-RADS 5.':
             [('findings', 'right breast: no mass. left breast: spiculated mass.'), ('impression', 'bi-rads 5.')],
         'LEFT BREAST ASSESSMENT: BI-RADS 5\nRIGHT BREAST ASSESSMENT: BI-RADS 1': [('assessment', 'left breast: bi-rads 5. right breast: bi-rads 1.')],
         'Left breast findings: mass. Right breast findings: none seen.': [('findings', 'left breast: mass. right breast: none seen.')],
         '**FINDINGS (LEFT BREAST)**\nMass.\n**FINDINGS (RIGHT BREAST)**\nN/A': [('findings', 'left breast: mass.')],
         'FINDINGS OF THE LEFT BREAST: Mass.': [('findings', 'left breast: mass.')], 'LEFT FINIDNGS: Mass.': [('findings', 'left: mass.')], 'Rt. breast findings: Mass.': [('findings', 'rt. breast: mass.')],
         'LEFT BREAST ULTRASOUND FINDINGS  Mass.': [('findings', 'left breast ultrasound: mass.')], 'LEFT BI-RADS: 5\nRIGHT BI-RADS: 1': [('assessment', 'left bi-rads: 5. right bi-rads: 1.')],
         'INDICATION: PAIN IN THE LEFT BREAST FINDINGS: Mass.': [('findings', 'mass.')]} # here the side is the indication's


@pytest.mark.parametrize('report', SIDED)
def test_side_stays_with_its_text(report):
    assert texts(report) == SIDED[report]


# joined headings
JOINED = {'FINDINGS AND IMPRESSION': 'findings', 'FINDINGS & IMPRESSION': 'findings', 'FINDINGS/ IMPRESSION': 'findings', 'FINDINGS AND RECOMMENDATIONS': 'findings', 'IMPRESSION AND PLAN': 'impression',
          'ASSESSMENT AND PLAN': 'assessment', 'FINDINGS, IMPRESSION': 'findings', 'TECHNIQUE AND FINDINGS': 'findings', 'IMPRESSION AND DISCUSSION': 'impression', 'IMPRESSION/RECOMMENDATION(S)': 'impression'}
TITLED = {'Findings/Impression': 'findings', 'Impression and recommendation': 'impression', 'Conclusion and Follow-up': 'impression', 'Findings and impression': 'findings'}
COLONS, BARE = ['{h}: {t}', '**{h}**: {t}', '1. {h} : {t}', '{h}:\r\n\r\n{t}'], ['{h}\n{t}', '**{h}**\n\n{t}']


@pytest.mark.parametrize('heads, forms', [(JOINED, [*COLONS, *BARE, '{h}  {t}', '{h} - {t}', '{h} {t}']), (TITLED, [*COLONS, *BARE]), ({'Finidngs and Impresson': 'findings'}, COLONS)], ids=['capitals', 'titles', 'misspelt'])
def test_joined_headings(heads, forms):
    text = 'There is a spiculated mass. BI-RADS 5.'
    for form in forms:
        for head, section in heads.items(): assert split_sections('HISTORY: Screening.\n\n' + form.format(h=head, t=text)) == {'history': 'Screening.', section: text}, (form, head)


# findings behind another heading, on the same line
@pytest.mark.parametrize('report, findings', [
    ('HISTORY: Screening. There is a spiculated mass.', 'There is a spiculated mass.'), ('COMPARISON: None. Both lungs remain clear. Heart is normal.\nIMPRESSION: Normal.', 'Both lungs remain clear. Heart is normal.'),
    ('COMPARISON: 2015. The mass is unchanged since the prior study.', 'The mass is unchanged since the prior study.'), ('TECHNIQUE: Two views were obtained. No mass.', 'No mass.'),
    ('TECHNIQUE: PA and lateral.\nHEART: normal.\nLUNGS: clear.\nIMPRESSION: n', 'HEART: normal.\nLUNGS: clear.'), ('FINDINGS: Chest. COMPARISON: There is a nodule.', 'Chest.\nThere is a nodule.'),
    ('Breast density: C. There is a spiculated mass.', 'There is a spiculated mass.'), ('HISTORY: Pain. Biopsy in 2019. Patient is complaining of a lump. There is a family history.', ''),
    ('COMPARISON: None. Heart size normal. Clear lungs.\nIMPRESSION: n', 'Heart size normal. Clear lungs.'), ('TECHNIQUE: Two views. The trachea is midline. Stable since the prior study.', 'The trachea is midline. Stable since the prior study.'),
    ('COMPARISON: Chest radiograph 2015. CT of 2016. Mammograms dated 3/4/2011.', ''), ('INDICATION: Fall. Altered status\nCHEST: There is a nodule.\nIMPRESSION: n', 'CHEST: There is a nodule.'),
    ('COMPARISON: No prior studies available.', ''), ('TECHNIQUE: Two views. Images were obtained with contrast.', ''), ('Density: B. The breast tissue is heterogeneously dense.', '')])
def test_findings_behind_another_heading(report, findings): assert split_sections(report).get('findings', '') == findings


# other languages
@pytest.mark.parametrize('report, sections', [
    ('INDICACIÓN: control.\nHALLAZGOS: masa.\nIMPRESIÓN: maligno.', ['findings']), ('INDIKATION: Vorsorge. BEFUND: Herd. BEURTEILUNG: BI-RADS 5.', ['findings']),
    ('INDICATION: dépistage.\nTECHNIQUE: face.\nRÉSULTATS: masse.\nCONCLUSION: ACR 5.', ['indication', 'technique', 'findings', 'impression']), ('HISTORIA: dolor. RESULTADOS: masa.', ['findings'])])
def test_other_languages_are_not_english(report, sections):
    found = split_sections(report)
    assert list(found) == sections and re.search('mas|Herd', found['findings'])


def test_alike_is_a_typing_error():
    assert {w: section_like(w) for w in ('finidngs', 'ndication', 'impresson', 'tecnique', 'comparsion')} == {'finidngs': 'findings', 'ndication': 'indication', 'impresson': 'impression', 'tecnique': 'technique', 'comparsion': 'comparison'}
    assert not any(section_like(w) for w in ('indicación', 'indicacion', 'indikation', 'conclusiones', 'résultats', 'histoire', 'comparaison', 'hallazgos', 'lungs', 'heart', 'mortality', 'plane'))
    assert section_of('weird') == '' and section_of('weird and findings', near=True) == ''


# shapes
@pytest.mark.parametrize('form', ['{h}:{t}', '{h} : {t}', '{h}：{t}', '**{h}**\n{t}', '**{h}:** {t}', '### {h}\n\n{t}', '{h}\n------\n{t}', '1. {h}: {t}', '• {h}: {t}', '> {h}: {t}', '{h}\r\n{t}', '{h} (continued): {t}', '_{h}_: {t}', '{h}\u00a0: {t}'])
@pytest.mark.parametrize('h', ['FINDINGS', 'Findings', 'findings', 'Mammographic Findings', 'FINDINGS:\n\nFINDINGS'])
def test_shapes(form, h): assert split_sections('preface\n\n' + form.format(h=h, t='There is a mass.')) == {'preamble': 'preface', 'findings': 'There is a mass.'}


@pytest.mark.parametrize('sentence', ['Findings suggest nothing.', 'There are the following findings: a mass.', 'These are benign\nfindings', 'called at 10:30', 'Other findings: none.', 'ratio 1:2', 'LEFT BREAST: mass'])
def test_no_headings(sentence): assert split_sections('Mass. ' + sentence) == {'findings': 'Mass. ' + sentence} and not find_headings(sentence)


@pytest.mark.parametrize('title', ['FINAL REPORT', 'Radiology Report', '**MAMMOGRAPHY REPORT**', ' WET READ', 'PRELIMINARY REPORT\n\nFINAL REPORT', 'Report'])
def test_a_title_is_no_finding(title):
    assert split_sections(f'{title}\n\nIMPRESSION: Mass.') == {'impression': 'Mass.'} and split_sections(f'{title}\r\nA mass.') == {'findings': 'A mass.'} and texts(title) == []
    assert words_of(split_sections(f'{title}\n\nA mass.', rest=True)['headings']) == words_of(title)


def test_addenda_and_numbers():
    assert split_sections('1. FINDINGS: a mass.\n2. IMPRESSION: benign.\nADDENDUM IMPRESSION: malignant.') == {'findings': 'a mass.', 'impression': 'benign.\nADDENDUM: malignant.'}
    assert split_sections('IMPRESSION: a.\nADDENDUM: b.\nIMPRESSION: c.') == {'impression': 'a.\nc.', 'addendum': 'b.'}
    assert split_sections('THYROID FINDINGS: nodule.') == {'findings': 'THYROID: nodule.'}
    assert split_sections('LEFT FINDINGS:\nRIGHT FINDINGS: mass', rest=True) == {'findings': 'RIGHT: mass', 'headings': 'FINDINGS LEFT FINDINGS'}


# no report
NOTHING = ['N/A', 'n/a', 'NA', 'n.a.', 'null', 'None', 'none.', '-', '--', '—', 'nil', 'NaN', '<NA>', '#N/A', 'not available', 'Not available.', 'No report', 'no report available', 'not applicable', '...', '', ' ', '[]', 'empty', 'Report not available']


@pytest.mark.parametrize('word', NOTHING)
def test_no_report(word):
    assert no_report(word) and normalise(word) == '' and split_sections(word) == {} and texts(word) == []
    assert texts(f'FINDINGS: {word}\nIMPRESSION: {word}') == [] and texts(f'FINDINGS: {word}\nIMPRESSION: Benign.') == [('impression', 'benign.')]
    assert texts(f'COMPARISON: {word}') == [] # its words are kept as the comparison's, but are no text
    assert report_sections(f' X\n FINDINGS:  {word}\n \n IMPRESSION:  Normal.\n') == {'impression': ' Normal.\n'} and report_sentences(f'FINDINGS: {word}') == []


def test_a_report(): assert not any(no_report(t) for t in ('No mass.', 'None seen.', 'Normal.', 'Nil acute.', 'No change', 'Negative', '0', 'no findings', 'Not enlarged.', 'BI-RADS 0', 'N/A, see CT: mass'))


def test_none_is_a_comparison(): assert split_sections('COMPARISON: None.\nFINDINGS: Mass.') == {'comparison': 'None.', 'findings': 'Mass.'}


def test_long_reports_are_quick():
    import time
    for piece in ('a: ', 'Ab Cd Ef: ', 'LEFT ', 'HEART:\n', 'AND FINDINGS AND ', '*', 'A\n', 'IMPRESSION and ', 'HISTORY: a. ', ':'):
        start = time.process_time()
        split_sections(piece*2_000)
        assert time.process_time() - start < 1.5, piece


# MIMIC-CXR
def test_ndication_is_no_impression():
    "A truncated INDICATION, which the public tool lists among the spellings of IMPRESSION."
    before, behind = ' FINAL REPORT\n NDICATION:  Fever, rule out pneumonia.\n \n FINDINGS:  The lungs are clear.\n ', ' FINAL REPORT\n IMPRESSION:  Normal chest study.\n \n NDICATION:  Chest pain, smoker.\n '
    assert lovt_sections(before) == {'findings': ' The lungs are clear.\n ', 'impression': ''} and lovt_sections(behind)['impression'].strip() == 'Normal chest study.'
    assert lovt_sections(behind, official=True)['impression'].strip() == 'Chest pain, smoker.' # as the tool
    for rules in ('auto', 'mimic', 'medvl'): assert report_sentences(before, rules=rules) == ['The lungs are clear.'] and report_sentences(behind, rules=rules) == ['Normal chest study.']
    assert report_sentences(behind, rules='official') == ['Chest pain, smoker.']
    assert judge_report(behind) == ({'findings': '', 'impression': 'Normal chest study.'}, '') and judge_report(behind, official=True)[0]['impression'] == 'Chest pain, smoker.'


def test_sides_in_mimic_form():
    assert report_sections(' X\n LEFT LUNG FINDINGS:  Clear.\n RIGHT LUNG FINDINGS:  Effusion.\n') == {'findings': 'LEFT LUNG: Clear.\nRIGHT LUNG: Effusion.'}
