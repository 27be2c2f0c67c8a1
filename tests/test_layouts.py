"Every layout from trees made by hand, every oddity of real downloads, hostile tables and archives, and no found name in any text."
import json
import os
import pickle
import random
import stat
import unicodedata
import zipfile

import numpy as np
import pytest

from sbldm_nb.layouts import LAYOUTS, Tree, discover

MR = 't1n', 't1c', 't2w', 't2f', 'seg'
OLD = 't1', 't1ce', 't2', 'flair', 'seg'


def grow(root, *names, content=b'x'):
    for name in names:
        path = root/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def zipped(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as z:
        for m in members: z.writestr(m, b'x')
    return path


def table(path, text, encoding='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def brats20(root, ids=(1, 2)): return grow(root, *(f'BraTS20_Training_{i:03}/BraTS20_Training_{i:03}_{m}.nii' for i in ids for m in OLD))


def brats23(root, ids=('00001-000',)): return grow(root, *(f'BraTS-GLI-{i}/BraTS-GLI-{i}-{m}.nii.gz' for i in ids for m in MR))


def pair(*prefix): return [f'{p}{f}/IM{k}' for p in prefix or ('',) for f in '12' for k in range(2)]


def task(root, modality, training, test=(), make=True):
    if make: grow(root, *(n for n in (*(v for e in training for v in e.values()), *test)))
    (root/'dataset.json').write_text(json.dumps(dict(name='x', modality=modality, training=list(training), test=list(test))))
    return root


def entries(*names): return [dict(image=f'./imagesTr/{n}.nii.gz', label=f'./labelsTr/{n}.nii.gz') for n in names]


def reasons(found): return sorted(why for _, why in found.left_out)


def balanced(found, tree):
    "Every file is in a case, read as a description, or left out; returns how many were read."
    left = [what for what, _ in found.left_out if what.startswith('file ')]
    assert len(set(left)) == len(left) and all(what.endswith(f' of {len(tree.paths)}') for what in left)
    return len(tree.paths) - len(left) - len({f for c in found.cases for f in c.files.values()})


def refused(folder, *causes, layout=None, error=ValueError):
    with pytest.raises(error) as e: discover(folder, layout)
    message = str(e.value)
    assert str(folder) in message and '\n' not in message and len(message) < 500
    for cause in causes: assert cause in message, message
    return message


# BraTS

def test_brats_2020_as_kaggle_wraps_it(tmp_path):
    train, valid = (tmp_path/f'BraTS2020_{k}Data'/f'MICCAI_BraTS2020_{k}Data' for k in ('Training', 'Validation'))
    brats20(train, (1, 354, 355))
    (train/'BraTS20_Training_355/BraTS20_Training_355_seg.nii').rename(train/'BraTS20_Training_355/W39_1998.09.19_Segm.nii')
    grow(valid, *(f'BraTS20_Validation_001/BraTS20_Validation_001_{m}.nii' for m in OLD[:4]), 'name_mapping_validation_data.csv', 'survival_evaluation.csv')
    grow(train, 'name_mapping.csv', 'survival_info.csv')
    found = discover(tmp_path)
    assert found.layout == 'brats' and [c.id for c in found.cases] == [f'BraTS20_{i}' for i in ('Training_001', 'Training_354', 'Training_355', 'Validation_001')]
    assert [set(c.files) for c in found.cases] == [set(MR)]*3 + [set(MR) - {'seg'}]
    assert found.cases[2].files['seg'].name == 'W39_1998.09.19_Segm.nii' and {c.split for c in found.cases} == {None}
    assert reasons(found) == ['no image']*4 and balanced(found, Tree(tmp_path)) == 0
    assert str(found) == 'brats: 4 cases of 4 patients; seg in 3, t1c, t1n, t2f, t2w; left out: no image (4)'


def test_any_level_above_the_cases_gives_the_same_cases(tmp_path):
    place = brats20(tmp_path/'a/b/c', (7,))
    for folder in (tmp_path, tmp_path/'a', tmp_path/'a/b', place, place/'BraTS20_Training_007'):
        found = discover(folder)
        assert [(c.id, c.patient, set(c.files)) for c in found.cases] == [('BraTS20_Training_007', 'BraTS20_Training_007', set(MR))]
        assert all(p.is_file() for p in found.cases[0].files.values())


def test_brats_2023_visits_are_one_patient(tmp_path):
    found = discover(brats23(tmp_path, ('00001-000', '00001-001', '01666-000')))
    assert [c.id for c in found.cases] == ['BraTS-GLI-00001-000', 'BraTS-GLI-00001-001', 'BraTS-GLI-01666-000']
    assert [c.patient for c in found.cases] == ['BraTS-GLI-00001']*2 + ['BraTS-GLI-01666']


def test_brats_names_of_other_years_and_habits(tmp_path):
    grow(tmp_path/'2018', *(f'{g}/Brats18_{i}_1/Brats18_{i}_1_{m}.nii.gz' for g, i in (('HGG', 'TCIA01'), ('LGG', 'TCIA09')) for m in OLD))
    assert [c.id for c in discover(tmp_path/'2018').cases] == ['Brats18_TCIA01_1', 'Brats18_TCIA09_1']
    grow(tmp_path/'2021', 'BRATS2021_00000/BRATS2021_00000_T1CE.NII.GZ', 'BRATS2021_00000/BRATS2021_00000_Flair.nii.gz')
    assert set(discover(tmp_path/'2021').cases[0].files) == {'t1c', 't2f'}
    grow(tmp_path/'bare', *(f'{g}/{i}/{m}.nii.gz' for g in ('pre', 'post') for i in ('001', '002') for m in ('t1', 'flair', 'seg')))
    assert [(c.id, c.patient) for c in discover(tmp_path/'bare').cases] == [('post/001', '001'), ('post/002', '002'), ('pre/001', '001'), ('pre/002', '002')]
    assert [(c.id, c.patient) for c in discover(tmp_path/'bare/pre/001').cases] == [('001', '001')]
    grow(tmp_path/'tar', *(f'BraTS2021_00495/00000057_{m}.nii' for m in ('brain_flair', 'brain_t1', 'brain_t1ce', 'brain_t2', 'final_seg')))
    assert [set(c.files) for c in discover(tmp_path/'tar').cases] == [set(MR)]


def test_one_modality_is_enough_and_a_missing_one_is_said(tmp_path):
    grow(tmp_path, 'a_t1.nii.gz', 'b_t1.nii.gz', 'b_t2.nii.gz')
    assert str(discover(tmp_path)) == 'brats: 2 cases of 2 patients; t1n, t2w in 1; left out: nothing'


def test_a_mask_is_adopted_only_where_there_is_no_doubt(tmp_path):
    flat = grow(tmp_path/'flat', *(f'BraTS20_Training_{i:03}_t1.nii' for i in (1, 2)), 'BraTS20_Training_002_seg.nii', 'W39_Segm.nii')
    found = discover(flat)
    assert 'seg' not in found.cases[0].files and reasons(found) == ['mask without its image']
    has = grow(tmp_path/'has', 'P1/P1_t1.nii', 'P1/P1_seg.nii', 'P1/other_seg.nii')
    assert discover(has).cases[0].files['seg'].name == 'P1_seg.nii' and reasons(discover(has)) == ['mask without its image']
    two = grow(tmp_path/'two', 'P1/P1_t1.nii', 'P1/x_seg.nii', 'P1/y_seg.nii')
    assert 'seg' not in discover(two).cases[0].files and reasons(discover(two)) == ['mask without its image']*2


def test_a_second_copy_is_left_out_and_said(tmp_path):
    found = discover(grow(brats20(tmp_path, (1,)), 'BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz', 'BraTS20_Training_001/BraTS20_Training_001_t2 (1).nii'))
    assert found.cases[0].files['t1n'].name == 'BraTS20_Training_001_t1.nii'
    assert reasons(found) == ['image of no case', 'second file of one role'] and balanced(found, Tree(tmp_path)) == 0


def test_bids_is_not_taken_for_brats(tmp_path):
    grow(tmp_path, *(f'sub-{i:02}/anat/sub-{i:02}_{m}.nii.gz' for i in (1, 2) for m in ('T1w', 'T2w', 'FLAIR')), 'participants.tsv', 'dataset_description.json')
    assert 'image of no case (6)' in refused(tmp_path, 'none of the layouts brats, decathlon')


# inpainting

@pytest.mark.parametrize('year', ['challenge', 'validation', 'numbered'])
def test_inpainting(tmp_path, year):
    what = dict(challenge=('t1n', 't1n-voided', 'mask', 'mask-healthy', 'mask-unhealthy'), validation=('t1n-voided', 'mask'),
                numbered=('t1n', *(f'{k}-000{i}' for k in ('t1n-voided', 'mask', 'mask-healthy') for i in range(3)), 't1n-healthy', 'seg'))[year]
    ids = ['BraTS-GLI-00002-000', 'BraTS-GLI-00002-001'] if year != 'numbered' else ['BraTS2021_00000', 'BraTS2021_00003']
    found = discover(grow(tmp_path, *(f'ASNR/{i}/{i}-{w}.nii.gz' for i in ids for w in what), *(f'ASNR/{i}/{i}-t1n-inference.nii.gz' for i in ids)))
    assert found.layout == 'inpainting' and [c.id for c in found.cases] == ids
    assert all(set(c.files) == {w.replace('t1n-voided', 'voided') for w in what} for c in found.cases)
    assert len({c.patient for c in found.cases}) == (2 if year == 'numbered' else 1) and reasons(found) == ['image of no case']*2


def test_growth_and_tissue_are_matched_by_id(tmp_path):
    ids = 'BraTS-GLI-00002-000', 'SIM-GLI-00012-000'
    grow(tmp_path, *(f'train_data/{i}/{i}-{w}.nii.gz' for i in ids for w in ('t1n', 't1n-voided-0000', 'mask-0000')),
         f'conditioning_data/growth_model/{ids[0]}.nii.gz', f'conditioning_data/growth_model/{ids[1].lower()}.nii.gz',
         f'conditioning_data/tissue_segmentation/{ids[0]}.nii.gz', 'conditioning_data/tissue_segmentation/BraTS-GLI-09999-000.nii.gz')
    found = discover(tmp_path)
    assert found.cases[0].files['growth'].parent.name == 'growth_model' and found.cases[0].files['tissue'].parent.name == 'tissue_segmentation'
    assert 'growth' in found.cases[1].files and 'tissue' not in found.cases[1].files
    assert reasons(found) == ['map of no case'] and balanced(found, Tree(tmp_path)) == 0
    assert set(discover(tmp_path, 'brats').cases[0].files) == {'t1n'}


# Decathlon

def test_decathlon(tmp_path):
    root = task(tmp_path/'Task01_BrainTumour', {'3': 'T2w', '0': 'FLAIR', '1': 'T1w', '2': 't1gd'}, entries('BRATS_457', 'BRATS_306'), ['./imagesTs/BRATS_485.nii.gz'])
    for folder in (tmp_path, root):
        found = discover(folder)
        assert [(c.id, c.patient, c.split, c.volumes) for c in found.cases] == \
            [(i, i, s, dict(t2f=0, t1n=1, t1c=2, t2w=3)) for i, s in (('BRATS_306', None), ('BRATS_457', None), ('BRATS_485', 'test'))]
        case = found.cases[0]
        assert case.files['t1c'] == case.files['t2f'] == root/'imagesTr/BRATS_306.nii.gz' and case.files['seg'].parent.name == 'labelsTr'
        assert 'seg' not in found.cases[2].files and found.left_out == ()


def test_decathlon_one_modality_has_no_volumes(tmp_path):
    case = discover(task(tmp_path, {'0': 'CT'}, entries('liver_1'))).cases[0]
    assert set(case.files) == {'ct', 'seg'} and case.volumes == {}


def test_decathlon_half_a_download(tmp_path):
    task(tmp_path, {'0': 'MRI'}, entries('a', 'b', 'b'), make=False)
    grow(tmp_path, 'imagesTr/a.nii.gz', 'imagesTr/b.nii.gz', 'labelsTr/b.nii.gz', 'imagesTr/._a.nii.gz', 'imagesTr/c.nii.gz')
    grow(tmp_path, 'labelsTr/a.nii.gz', content=b'')
    found = discover(tmp_path)
    assert [set(c.files) for c in found.cases] == [{'mri'}, {'mri', 'seg'}]
    assert reasons(found) == ['empty', 'entry given before', 'hidden', 'image of no case'] and balanced(found, Tree(tmp_path)) == 1


@pytest.mark.parametrize('text', ['{"training": [', '[' * 100_000, '\xff', '{"modality": NaN'])
def test_decathlon_damaged_description(tmp_path, text):
    grow(tmp_path, 'imagesTr/a.nii.gz')
    table(tmp_path/'dataset.json', text, 'latin-1')
    refused(tmp_path, 'file 1 of 2 in the order of their names is a dataset.json that cannot be read')


@pytest.mark.parametrize('description', [[], {}, 3, {'training': 3, 'modality': {'0': 'CT'}}, {'training': [], 'modality': []},
                                         {'channel_names': {'0': 'CT'}, 'numTraining': 2, 'file_ending': '.nii.gz'}, {'training': [3, None, {}, {'image': 3}], 'modality': {'0': 3}}])
def test_a_dataset_json_of_another_kind_is_no_decathlon(tmp_path, description):
    grow(tmp_path, 'imagesTr/a_0000.nii.gz')
    (tmp_path/'dataset.json').write_text(json.dumps(description))
    refused(tmp_path, 'none of the layouts')
    refused(tmp_path, 'no decathlon layout, expected a dataset.json that lists', layout='decathlon')


@pytest.mark.parametrize('image', ['/etc/passwd', '../secret.nii.gz', './imagesTr/../../secret.nii.gz', '..\\secret.nii.gz'])
def test_decathlon_that_leads_outside(tmp_path, image):
    grow(tmp_path, 'secret.nii.gz')
    grow(tmp_path/'task', 'imagesTr/a.nii.gz', 'labelsTr/a.nii.gz')
    refused(task(tmp_path/'task', {'0': 'CT'}, [*entries('a'), dict(image=image)], make=False), 'entry 2 of 2 of its training list names a place outside the folder')
    refused(task(tmp_path/'task', {'0': 'CT'}, [dict(image='imagesTr/a.nii.gz', label=image)], make=False), 'entry 1 of 1')


def test_two_decathlon_tasks(tmp_path):
    for t in ('Task01', 'Task04'): task(tmp_path/t, {'0': 'MRI'}, entries('a'))
    refused(tmp_path, '2 Decathlon tasks are below it')


# tables

@pytest.mark.parametrize('mark,newline,bom', [(',', '\n', ''), (';', '\r\n', '\ufeff'), ('\t', '\r', ''), (',', '\r\n', '\ufeff')])
def test_hc_tle_tables_of_any_programme(tmp_path, mark, newline, bom):
    grow(tmp_path, 'img/Müller_1.nii.gz', 'img/b.png', 'img/c/IM1', 'img/c/IM2')
    zipped(tmp_path/'img/d.zip', 'IM1')
    rows = [['Age', 'PATIENT', 'Label ', 'path'], ['6', '1', 'TLE', 'IMG/müller_1.nii.gz'], ['7', '2', ' HC', 'img\\b.png'], ['', '3', 'hc', 'img/c'], ['', '', '', ''],
            ['8', '4', 'HC', str(tmp_path/'img/d.zip')]]
    table(tmp_path/'list.csv', bom + newline.join(mark.join(r) for r in rows))
    found = discover(tmp_path)
    assert found.layout == 'hc_tle' and [(c.patient, c.label, c.files['image'].name) for c in found.cases] == \
        [('1', 'TLE', 'Müller_1.nii.gz'), ('2', 'HC', 'b.png'), ('3', 'HC', 'c'), ('4', 'HC', 'd.zip')]
    assert found.left_out == ()


def test_hc_tle_finds_decomposed_letters_quotes_and_folders(tmp_path):
    grow(tmp_path, 'img/' + unicodedata.normalize('NFD', 'Müller, J._1.nii.gz'), 'dcm/7/1.dcm', 'dcm/7/sub/2.dcm', 'dcm/70/1.dcm')
    table(tmp_path/'lists/a.csv', 'path,label,patient\n"../img/Müller, J._1.nii.gz",HC,1\ndcm/7,TLE,2\n../img/gone.nii,HC,3\na\0b,HC,4\n')
    found = discover(tmp_path)
    assert [(c.label, c.files['image'].name) for c in found.cases] == [('TLE', '7'), ('HC', unicodedata.normalize('NFD', 'Müller, J._1.nii.gz'))]
    assert reasons(found) == ['image of no case'] + ['its file is not there or not usable']*2               # the image of dcm/70


def test_hc_tle_absolute_paths_through_a_linked_disk(tmp_path):
    grow(tmp_path/'disk', 'a.nii.gz')
    (tmp_path/'data').symlink_to('disk')
    table(tmp_path/'disk/list.csv', f'path,label,patient\n{tmp_path}/data/a.nii.gz,HC,1\n')
    for folder in ('data', 'disk'): assert discover(tmp_path/folder).cases[0].files == {'image': tmp_path/folder/'a.nii.gz'}


@pytest.mark.parametrize('path', ['/etc/passwd', '../secret.nii.gz', 'a/../../secret.nii.gz', '..\\secret.nii.gz', '//secret', '/', '..', 'link/secret.nii.gz'])
def test_hc_tle_that_leads_outside(tmp_path, path):
    grow(tmp_path, 'secret.nii.gz')
    grow(tmp_path/'data', 'a.nii.gz')
    (tmp_path/'data/link').symlink_to(tmp_path)
    table(tmp_path/'data/list.csv', f'path,label,patient\na.nii.gz,HC,1\n"{path}",HC,2\n')
    message = refused(tmp_path/'data', 'row 2 of 2 of its table names a place outside the folder')
    assert 'secret' not in message and 'passwd' not in message


def test_hc_tle_rows_that_lack_something(tmp_path):
    grow(tmp_path, 'a.nii.gz', 'b.nii.gz')
    grow(tmp_path, 'e.nii.gz', content=b'')
    table(tmp_path/'list.csv', 'path,label,patient\na.nii.gz,HC,1\na.nii.gz,hc,1\nb.nii.gz,,2\ngone.nii.gz,HC,3\ne.nii.gz,HC,4\nC:\\x\\y.nii,HC,5\n.,HC,6\nb\n')
    found = discover(tmp_path)
    assert len(found.cases) == 1 and balanced(found, Tree(tmp_path)) == 1
    assert dict(found.left_out) == {'file 2 of 4': 'image of no case', 'file 3 of 4': 'empty', 'row 2 of 8': 'row given before',
                                    **{f'row {k} of 8': 'row without path, label or patient' for k in (3, 8)}, **{f'row {k} of 8': 'its file is not there or not usable' for k in (4, 5, 6, 7)}}


@pytest.mark.parametrize('text,cause', [('a.nii.gz,HC,1\nA.nii.gz,TLE,1', 'rows 1 and 2 of 2'), ('a.nii.gz,HC,1\na.nii.gz,HC,2', 'rows 1 and 2 of 2'),
                                        ('a.nii.gz,HC,\xfc', 'cannot be read as UTF-8'), (f'a.nii.gz,HC,{"1"*200_000}', 'cannot be read')])
def test_hc_tle_tables_that_contradict_or_are_damaged(tmp_path, text, cause):
    grow(tmp_path, 'a.nii.gz')
    table(tmp_path/'list.csv', 'path,label,patient\n' + text, 'latin-1')
    refused(tmp_path, cause)


def test_hc_tle_wants_one_table(tmp_path):
    grow(tmp_path, 'a.nii.gz')
    for name in ('x.csv', 'y.csv'): table(tmp_path/name, 'path,label,patient\na.nii.gz,HC,1\n')
    refused(tmp_path, 'expected one table with the columns path, label, patient, found 2')


def test_hc_tle_given_split_is_kept_and_no_patient_is_in_two(tmp_path):
    grow(tmp_path, 'train/a.nii.gz', 'val/b.nii.gz')
    table(tmp_path/'t.csv', 'path,label,patient\ntrain/a.nii.gz,HC,1\nval/b.nii.gz,HC,2\n')
    assert [c.split for c in discover(tmp_path).cases] == ['train', 'valid']
    table(tmp_path/'t.csv', 'path,label,patient\ntrain/a.nii.gz,HC,1\nval/b.nii.gz,HC,1\n')
    refused(tmp_path, '1 of 1 patient, as names or a table tell them, on two sides')


# the cohort's own layout

def test_nifti(tmp_path):
    grow(tmp_path, *(f'sim-{i:06}/sim-{i:06}_{m}.nii.gz' for i in range(3) for m in ('t1', 'tissue', 'hippocampus')), 'sim-000000/sim-000000.json')
    assert str(discover(tmp_path)) == 'nifti: 3 cases of 3 patients; hippocampus, t1, tissue; left out: no image (1)'
    table(tmp_path/'participants.csv', 'id,group,seed,age\nsim-000000,HC,0,\nsim-000002,TLE-R,2,\nsim-000009,HC,9,\n')
    found = discover(tmp_path)
    assert [c.label for c in found.cases] == ['HC', None, 'TLE-R'] and ('row 3 of 3', 'its images are not there') in found.left_out
    assert balanced(found, Tree(tmp_path)) == 1
    for p in tmp_path.glob('*/*_[!t]*'): p.unlink()
    for p in tmp_path.glob('*/*_tissue*'): p.unlink()
    assert [c.id for c in discover(tmp_path).cases] == ['sim-000000', 'sim-000002'], 'T1 alone is enough where the table names the person'


# thick and thin

def test_ct_pairs_with_categories(tmp_path):
    for name in ('APE/1', 'APE/2', 'non-APE/1'): zipped(tmp_path/f'train/{name}.ZIP', *pair('x/'), '__MACOSX/x/1/._IM0')
    zipped(tmp_path/'val/APE/7.zip', *pair(), 'LICENSE')
    found = discover(tmp_path)
    assert [(c.id, c.patient, c.label, c.split) for c in found.cases] == [('train/APE/1', 'train/APE/1', 'APE', 'train'), ('train/APE/2', '2', 'APE', 'train'),
        ('train/non-APE/1', 'train/non-APE/1', 'non-APE', 'train'), ('val/APE/7', '7', 'APE', 'valid')]
    assert found.cases[0].files == dict(thick=tmp_path/'train/APE/1.ZIP/x/1', thin=tmp_path/'train/APE/1.ZIP/x/2') and found.left_out == ()


@pytest.mark.parametrize('names,labels', [(['a', 'b'], [None, None]), (['P1/scan', 'P2/scan'], [None, None]), (['APE/a', 'non/b'], ['APE', 'non']), (['APE/a', 'b'], ['APE', None]),
                                          (['APE/a', 'APE/b'], [None, None]), (['APE/1', 'APE/2', 'non/1'], ['APE', 'APE', 'non']),
                                          (['train/1', 'train/2', 'val/3'], [None]*3), (['train/APE/1', 'train/non/2', 'val/3'], ['APE', 'non', None])])
def test_which_parent_folder_is_a_category(tmp_path, names, labels):
    for name in names: zipped(tmp_path/f'{name}.zip', *pair())
    found = discover(tmp_path)
    assert [c.label for c in found.cases] == labels and len({c.patient for c in found.cases}) == len(names)


def test_zips_that_are_no_pair(tmp_path):
    zipped(tmp_path/'ok.zip', *pair('deep/er/'))
    zipped(tmp_path/'series.zip', *(f'{a}/{b}/IM' for a in '12' for b in '12'))
    zipped(tmp_path/'thick.zip', '1/IM')
    zipped(tmp_path/'two.zip', *pair('a/', 'b/'))
    zipped(tmp_path/'slip.zip', *pair(), '../../evil')
    link = zipfile.ZipInfo('1/link')
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path/'link.zip', 'w') as z:
        for m in pair(): z.writestr(m, b'x')
        z.writestr(link, '/etc/passwd')
    (tmp_path/'cut.zip').write_bytes((tmp_path/'ok.zip').read_bytes()[:-30])
    grow(tmp_path, 'text.zip')
    found = discover(tmp_path)
    assert [c.id for c in found.cases] == ['ok', 'series'] and found.cases[1].files['thin'] == tmp_path/'series.zip/2'
    assert len(found.left_out) == 6 and all(why.startswith('zip: ') for why in reasons(found)) and 'evil' not in str(found)


@pytest.mark.parametrize('level', ['', 'RPLHR', 'RPLHR-CT/RPLHR'])
def test_rplhr(tmp_path, level):
    grow(tmp_path/level, *(f'{s}/{mm}/CT{i:08}.nii.gz' for s, k in (('train', (0, 1)), ('val', (2,)), ('test', (3,))) for i in k for mm in ('1mm', '5mm')), 'readme.md')
    found = discover(tmp_path)
    assert found.layout == 'rplhr' and [(c.patient, c.split, set(c.files)) for c in found.cases] == \
        [(f'CT{i:08}', s, {'thin', 'thick'}) for i, s in ((3, 'test'), (0, 'train'), (1, 'train'), (2, 'valid'))]
    assert all(c.files['thin'].parent.name == '1mm' for c in found.cases)
    one = discover(tmp_path/level/'train')
    assert one.layout == 'rplhr' and [c.split for c in one.cases] == [None, None]


# latents

def arrays(root, *names, shape=(4, 3, 3, 2), dtype=np.float32):
    root.mkdir(parents=True, exist_ok=True)
    for name in names: np.save(root/name, np.zeros(shape, dtype), allow_pickle=True)
    return root


def test_latents(tmp_path):
    arrays(tmp_path, 'sub-01_ses-1_T1w.npy', 'sub-01_ses-2_T1w.npy', 'sim-000003_t1.npy')
    arrays(tmp_path, 'flat.npy', shape=(3, 3))
    arrays(tmp_path, 'objects.npy', shape=(1, 1, 1, 1), dtype=object)
    grow(tmp_path, 'text.npy')
    (tmp_path/'cut.npy').write_bytes((tmp_path/'sim-000003_t1.npy').read_bytes()[:-1])
    np.savez(tmp_path/'z', x=np.zeros(3))
    (tmp_path/'z.npz').rename(tmp_path/'z.npy')
    found = discover(tmp_path)
    assert [(c.patient, set(c.files)) for c in found.cases] == [('sim-000003', {'latent'}), ('sub-01', {'latent'}), ('sub-01', {'latent'})]
    assert reasons(found) == ['array without four axes, or damaged']*5 and balanced(found, Tree(tmp_path)) == 0


def test_latents_with_a_table(tmp_path):
    arrays(tmp_path/'train', 'a.npy', 'b.npy')
    arrays(tmp_path/'val', 'c.npy')
    arrays(tmp_path/'val', 'd.npy', shape=(3, 3))
    table(tmp_path/'latents.csv', 'path,label,patient\ntrain/a.npy,HC,1\ntrain/b.npy,TLE,2\nval/c.npy,HC,3\nval/d.npy,HC,4\n')
    found = discover(tmp_path)
    assert [(c.patient, c.label, c.split) for c in found.cases] == [('1', 'HC', 'train'), ('2', 'TLE', 'train'), ('3', 'HC', 'valid')]
    assert reasons(found) == ['array without four axes, or damaged'] and balanced(found, Tree(tmp_path)) == 1


def test_latents_of_a_latent_cache(tmp_path):
    vae = pytest.importorskip('sbldm_nb.vae')
    rows = dict(mean=np.zeros((5, 2, 4, 3, 3), np.float32), logvar=np.zeros((5, 2, 4, 3, 3), np.float32), subject=np.array([3, 3, 4, 4, 7]), position=np.zeros(5))
    vae.write_table(tmp_path/'cache', [rows], 5, dict(vae='abc', seed=0))
    for folder in (tmp_path, tmp_path/'cache'):
        found = discover(folder)
        assert found.layout == 'latents' and [(c.patient, c.volumes) for c in found.cases] == [(p, {'latent': i}) for i, p in enumerate('33447')]
        assert {c.files['latent'] for c in found.cases} == {tmp_path/'cache'} and found.left_out == ()
    vae.write_table(tmp_path/'other', [rows], 5, dict(vae='abc', seed=0))
    refused(tmp_path, '2 latent caches are below it')
    np.save(tmp_path/'cache/subject.npy', np.arange(4))
    refused(tmp_path/'cache', 'none of the layouts')
    (tmp_path/'other/subject.npy').unlink()
    refused(tmp_path/'other', 'no latents layout, expected', layout='latents')


def test_array_headers_by_chance_are_refused_not_raised(tmp_path):
    rng, good = random.Random(0), arrays(tmp_path, 'a_1.npy')/'a_1.npy'
    raw = good.read_bytes()
    for _ in range(400):
        bad = bytearray(raw)
        for _ in range(rng.randrange(1, 6)): bad[rng.randrange(128)] = rng.choice(b"\0\n(){}[]',:9<>fiOVTrue\xff" if rng.random() < .7 else range(256))
        (tmp_path/'b_1.npy').write_bytes(bad)
        assert {c.files['latent'].name for c in discover(tmp_path).cases} <= {'a_1.npy', 'b_1.npy'}


# two folders

def test_folder(tmp_path):
    grow(tmp_path/'a', 'train/sub-1_ses-1_T1w.nii.gz', 'Train/sub-1_ses-2_T1w.nii.gz', 'train/x/sub-2_T1w.NII', 'val/sub-3.png', 'Validation/sub-4_a.JPEG', 'test/sub-5.jpg', 'other/sub-6.png', 'val/notes.txt')
    found = discover(tmp_path)
    assert found.layout == 'folder' and {c.patient: c.split for c in found.cases} == {'sub-1': 'train', 'sub-2': 'train', 'sub-3': 'valid', 'sub-4': 'valid', 'sub-5': 'test'}
    assert all(set(c.files) == {'image'} for c in found.cases)
    assert reasons(found) == ['image of no case', 'no image'] and balanced(found, Tree(tmp_path)) == 0


@pytest.mark.parametrize('names', [['train/a_1.png'], ['val/a_1.png', 'test/b_1.png'], ['train/a_1.png', 'test/b_1.png'], ['a_1.png', 'b_1.png']])
def test_folder_wants_train_and_val(tmp_path, names):
    grow(tmp_path, *names)
    refused(tmp_path, 'none of the layouts')
    refused(tmp_path, 'no folder layout, expected pictures or NIfTI files below train/ and val/', layout='folder')


def test_a_word_in_a_path_is_no_split(tmp_path):
    for name in ('test', 'Training', 'val'):
        brats20(tmp_path/name/name/'x')
        assert {c.split for c in discover(tmp_path/name).cases} == {None}
    assert {c.split for c in discover(brats20(tmp_path/'raw/train/train')).cases} == {None}


def test_a_split_made_with_folders_is_kept_for_brats_and_a_torn_patient_refused(tmp_path):
    brats23(tmp_path/'training', ('00001-000', '00001-001'))
    brats23(tmp_path/'validation', ('00002-000',))
    assert [c.split for c in discover(tmp_path).cases] == ['train', 'train', 'valid']
    brats23(tmp_path/'validation', ('00001-002',))
    assert '00001' not in refused(tmp_path, '1 of 2 patients, as names or a table tell them, on two sides of the split', 'the first of them number 1').replace(str(tmp_path), '')
    for part in ('train', 'val'): brats23(tmp_path/'both'/part, ('00005-000',))
    refused(tmp_path/'both', '1 of 1 patient')


# what lies about

def test_what_lies_about_in_downloads(tmp_path):
    out, data = grow(tmp_path/'out', 'secret_t1.nii'), brats20(tmp_path/'data', (1,))
    grow(data, '.git/x_t1.nii', '__MACOSX/BraTS20_Training_009/BraTS20_Training_009_t1.nii', 'BraTS20_Training_001/._BraTS20_Training_001_t1.nii', '.DS_Store',
         'x_t1.nii.gz.part', 'Unconfirmed 3.crdownload', 'y.nii.gz.aria2', 'all.tar.gz', 'more.zip', 'README')
    grow(data, 'BraTS20_Training_002/BraTS20_Training_002_t1.nii', content=b'')
    for name, target in dict(a_t1=out/'secret_t1.nii', b_t1='../out/secret_t1.nii', c_t1='nowhere.nii', d_t1='d_t1.nii', e_t1='a_t1.nii').items(): (data/f'{name}.nii').symlink_to(target)
    (data/'linked').symlink_to(out)
    (data/'loop').symlink_to(data)
    (data/'BraTS20_Training_003_t1.nii').symlink_to('BraTS20_Training_001/BraTS20_Training_001_t1.nii')
    os.mkfifo(data/'pipe_t1.nii')
    found = discover(data)
    assert [c.id for c in found.cases] == ['BraTS20_Training_001', 'BraTS20_Training_003']
    assert reasons(found) == sorted(['hidden']*4 + ['unfinished download']*3 + ['archive that is not unpacked']*2 + ['no image', 'empty', 'no regular file'] + ['linked folder']*2
                                    + ['link that leaves the folder']*3 + ['file that cannot be opened']*2)
    assert balanced(found, Tree(data)) == 0


def test_datalad_links_inside_the_folder_are_followed(tmp_path):
    grow(tmp_path, *(f'.git/annex/objects/{k}' for k in 'ab'))
    for k, m in zip('ab', ('t1', 'seg')):
        (tmp_path/'P1').mkdir(exist_ok=True)
        (tmp_path/f'P1/P1_{m}.nii.gz').symlink_to(f'../.git/annex/objects/{k}')
    assert set(discover(tmp_path).cases[0].files) == {'t1n', 'seg'}


@pytest.mark.skipif(os.geteuid() == 0, reason='root opens every folder')
def test_a_locked_folder_is_said(tmp_path):
    brats20(tmp_path)
    (tmp_path/'BraTS20_Training_002').chmod(0)
    try: assert reasons(discover(tmp_path)) == ['folder that cannot be opened']
    finally: (tmp_path/'BraTS20_Training_002').chmod(0o755)


def test_relative_folders_and_links_to_the_folder(tmp_path, monkeypatch):
    brats20(tmp_path/'data', (1,))
    table(tmp_path/'csv/t.csv', 'path,label,patient\na.nii.gz,HC,1\n')
    grow(tmp_path/'csv', 'a.nii.gz')
    (tmp_path/'link').symlink_to('data')
    monkeypatch.chdir(tmp_path/'data')
    for folder in ('.', '../data', '../link', tmp_path/'link', str(tmp_path/'data') + '/'):
        assert [c.id for c in discover(folder).cases] == ['BraTS20_Training_001'] and all(p.is_file() for p in discover(folder).cases[0].files.values())
    assert discover('../csv').cases[0].files['image'].is_file()
    monkeypatch.chdir(tmp_path/'csv')
    assert discover('.').cases[0].files['image'].is_file()


# which layout

def test_the_louder_evidence_wins(tmp_path):
    brats20(tmp_path/'a', (1, 2))
    table(tmp_path/'a/list.csv', 'path,label,patient\nBraTS20_Training_001/BraTS20_Training_001_t1.nii,HC,1\n')
    assert discover(tmp_path/'a').layout == 'hc_tle' and discover(tmp_path/'a', 'brats').layout == 'brats'
    grow(tmp_path/'c', 'sim-1/sim-1_t1.nii.gz', 'sim-1/sim-1_tissue.nii.gz')
    table(tmp_path/'c/participants.csv', 'id,group\nsim-1,HC\n')
    assert discover(tmp_path/'c').layout == 'nifti'
    table(tmp_path/'c/hc_tle.csv', 'path,label,patient\nsim-1/sim-1_t1.nii.gz,HC,sim-1\n')
    assert discover(tmp_path/'c').layout == 'hc_tle'
    grow(tmp_path/'b', *(f'{s}/{i}/{i}_{m}.nii.gz' for s, i in (('train', 'sim-1'), ('val', 'sim-2')) for m in ('t1', 'tissue')))
    assert [discover(tmp_path/'b', name).layout for name in (None, 'brats', 'folder', 'nifti')] == ['nifti', 'brats', 'folder', 'nifti']


def test_two_equally_good_are_both_named(tmp_path):
    grow(tmp_path/'x', 'P_t1n.nii.gz', 'P_t1n-voided.nii.gz', 'P_mask.nii.gz')
    grow(tmp_path/'y', '1mm/a.nii.gz', '5mm/a.nii.gz', '1mm/b.nii.gz', '5mm/b.nii.gz')
    refused(tmp_path, 'looks like inpainting (1 case) and like rplhr (2 cases)')
    assert len(discover(tmp_path, 'rplhr').cases) == 2


def test_nothing_there(tmp_path):
    refused(tmp_path/'x', 'no such folder', error=FileNotFoundError)
    refused(grow(tmp_path, 'f.nii')/'f.nii', 'a file, where a folder is wanted', error=FileNotFoundError)
    (tmp_path/'empty').mkdir()
    for layout in LAYOUTS: refused(tmp_path/'empty', f'no {layout} layout, expected', 'what is there: nothing', layout=layout)
    refused(grow(tmp_path/'tar', 'BraTS2021_Training_Data.tar'), 'archive that is not unpacked (1)')
    with pytest.raises(ValueError, match="layout 'Brats' is unknown .did you mean 'brats'"): discover(tmp_path, 'Brats')


# nobody's name

def test_no_found_name_in_any_text(tmp_path):
    "An identity planted in every place where a name can stand, through success and failure."
    who = 'Sonnenschein'
    trees = {n: tmp_path/f'tree{i}' for i, n in enumerate(('brats', 'tables', 'torn', 'decathlon', 'json', 'zips', 'outside', 'nothing', 'contradiction', 'latin', 'inpainting'))}
    grow(trees['brats'], f'{who}/{who}_t1.nii', f'{who}/.{who}', f'{who}/{who}.tar', f'{who}_seg.nii', f'{who}.csv')
    grow(trees['tables'], f'{who}.nii')
    table(trees['tables']/f'{who}.csv', f'path,label,patient\n{who}.nii,{who},{who}\n{who}2.nii,{who},{who}\n')
    grow(trees['torn'], f'train/{who}_1.png', f'val/{who}_2.png')
    task(trees['decathlon'], {'0': who, '1': 'T2'}, entries(who, f'{who}2')), (trees['decathlon']/f'imagesTr/{who}2.nii.gz').unlink()
    grow(trees['json'], f'{who}/x.nii'), table(trees['json']/f'{who}/dataset.json', f'{{"{who}"')
    zipped(trees['zips']/f'{who}/{who}.zip', *pair(f'{who}/')), zipped(trees['zips']/f'{who}2.zip', f'../{who}'), zipped(trees['zips']/f'{who}3.zip', f'{who}.zip')
    table(trees['outside']/'x.csv', f'path,label,patient\n/{who}/{who}.nii,{who},{who}\n')
    grow(trees['nothing'], f'{who}.nii', f'{who}.exe')
    grow(trees['contradiction'], f'{who}.nii'), table(trees['contradiction']/'x.csv', f'path,label,patient\n{who}.nii,{who},1\n{who}.nii,x,1\n')
    table(trees['latin']/f'{who}.csv', f'path,label,patient\n{who}\xfc.nii,{who},1\n', 'latin-1')
    grow(trees['inpainting'], f'{who}-t1n.nii', f'{who}-t1n-voided-0001.nii', f'{who}-t1n-voided-19610203.nii', f'growth_model/{who}2.nii')
    texts = []
    for tree in trees.values():
        for layout in (None, *LAYOUTS):
            try: found = discover(tree, layout)
            except ValueError as e: texts += [str(e)]
            else: texts += [str(found), repr(found), repr(found.cases), repr(found.left_out), str(found.cases[0].files.keys())]
    assert len(texts) > 100 and not [t for t in texts if who.lower() in t.lower() or '1961' in t]


def test_names_by_chance(tmp_path):
    "Trees made of the words that names are made of: a result whose books balance, or one ValueError."
    rng, outcomes = random.Random(1), set()
    words = ['train', 'val', 'test', '1mm', '5mm', 't1', 't1n', 'T2W', 'seg', 'mask', 'voided', '0001', 'P1', 'P2', 'BraTS-GLI-00005-000', 'sub-1', 'growth_model', 'é', ' ', '..x', '\udcff', 'tissue']
    for k in range(100):
        root = tmp_path/str(k)
        for _ in range(rng.randrange(1, 25)):
            parts = [rng.choice(['-', '_', '.', ''] if rng.random() < .3 else ['_', '-']).join(rng.choices(words, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
            try: grow(root, '/'.join(parts) + rng.choice(['.nii', '.nii.gz', '.NII.GZ', '.png', '.zip', '.csv', '.npy', '', '.json']), content=rng.choice([b'x', b'']))
            except (NotADirectoryError, IsADirectoryError, FileExistsError): pass
        for layout in (None, *LAYOUTS):
            try: found = discover(root, layout)
            except ValueError as e: outcomes.add('refused'); str(e).encode(); continue
            outcomes.add(found.layout)
            assert balanced(found, Tree(root)) == 0 and len({c.id for c in found.cases}) == len(found.cases)
            assert all(len(s) == 1 for s in [{c.split for c in found.cases if c.patient == p} for p in {c.patient for c in found.cases}])
    assert outcomes >= {'refused', 'brats', 'inpainting', 'folder'}


def test_a_result_travels_to_another_process(tmp_path):
    found = discover(brats20(tmp_path))
    assert pickle.loads(pickle.dumps(found)) == found
