"Hostile folders, tables and lists: paths that leave, links, names in every script, damaged JSON and CSV, arrays that would run code."
import json
import os
import pickle

import numpy as np
import pytest

from faults.build import SLICES, VOXELS, archive, dataset, dicom, gz, inner, nifti, png, write
from faults.harness import Table, discover, judge, put

hostile = Table()


def brats(here, *names, roles=('t1n', 't1c')):
    for name in names or ('BraTS-GLI-00001-000', 'BraTS-GLI-00002-000'):
        for role in roles: write(here/name/f'{name}-{role}.nii.gz', gz(nifti()))
    return here

def table(here, *rows, head='path,label,patient'):
    "A list of pictures with the identity of their owners."
    for k in range(3): write(here/f'DOE_JANE_{k}.png', png())
    return write(here/'labels.csv', '\n'.join([head, *rows]).encode('utf-8', 'surrogateescape')).parent

def task(here, **changes):
    "A Decathlon task."
    for k in range(2):
        write(here/'imagesTr'/f'DOE_{k}.nii.gz', gz(nifti()))
        write(here/'labelsTr'/f'DOE_{k}.nii.gz', gz(nifti((VOXELS > 50).astype(np.uint8))))
    training = [{'image': f'./imagesTr/DOE_{k}.nii.gz', 'label': f'./labelsTr/DOE_{k}.nii.gz'} for k in range(2)]
    write(here/'dataset.json', json.dumps({'name': 'DOE', 'modality': {'0': 'MRI'}, 'labels': {'0': 'b', '1': 'a'}, 'training': training, 'test': [], **changes}).encode())
    return here

def cases(n): return lambda value: value['cases'] == n


# nothing, or not a folder

@hostile(discover, kinds=(FileNotFoundError,))
def missing(here): return here/'nowhere'

@hostile(discover)
def empty(here): return here

@hostile(discover, kinds=(FileNotFoundError, ValueError))
def a_file_for_a_folder(here): return write(here/'a.nii.gz', gz(nifti()))

@hostile(discover, kinds=(FileNotFoundError, ValueError), named=False)
def nul_in_the_name(here): return f'{here}/DOE\0'

@hostile(discover, kinds=(FileNotFoundError, ValueError, OSError))
def name_of_5000_bytes(here): return here/('n'*5000)

@hostile(discover)
def text_alone(here): return write(here/'DOE_JANE.txt', b'MRN-4711').parent

@hostile(discover)
def hidden_files_alone(here): return brats(here/'.DOE').parent

@hostile(discover)
def empty_files_alone(here):
    for role in ('t1n', 't1c'): write(here/'BraTS-GLI-00001-000'/f'BraTS-GLI-00001-000-{role}.nii.gz', b'')
    return here

@hostile(discover, 'layout', layout='brast', named=False)
def layout_misspelt(here): return brats(here)

@hostile(discover, 'rplhr', layout='rplhr')
def layout_that_is_not_there(here): return brats(here)

@hostile(discover, kinds=(PermissionError, ValueError), mortal=True)
def folder_nobody_may_enter(here):
    brats(here/'d').chmod(0)
    return here/'d'

@hostile(discover, mortal=True, reads=cases(2))
def one_folder_nobody_may_enter(here):
    brats(here, 'BraTS-GLI-00001-000', 'BraTS-GLI-00002-000', 'BraTS-GLI-00003-000')
    (here/'BraTS-GLI-00003-000').chmod(0)
    return here


# names

@hostile(discover, reads=cases(2))
def names_in_many_scripts(here): return brats(here, 'Größe-脳', 'пациент 🧠')

@hostile(discover, reads=cases(2))
def names_of_200_bytes(here): return brats(here, 'a'*200, 'b'*200)

@hostile(discover, reads=cases(2))
def folders_sixty_levels_deep(here): return brats(here.joinpath(*['DOE']*60)) and here

@hostile(discover, reads='either')
def names_with_newlines(here): return brats(here, 'DOE\nTraceback', 'DOE\r\nJANE')

@hostile(discover, reads='either')
def names_that_are_not_text(here):
    for who in (b'DOE\xff', b'JANE\xfe'):
        folder = os.path.join(os.fsencode(here), who)
        os.mkdir(folder)
        for role in (b'-t1n', b'-t1c'):
            with open(os.path.join(folder, who + role + b'.nii.gz'), 'wb') as f: f.write(gz(nifti()))
    return here

@hostile(discover, reads='either')
def names_that_differ_in_capitals(here): return brats(here, 'brats-gli-00001-000', 'BRATS-GLI-00001-000')

@hostile(discover, reads='either')
def the_same_letter_written_twice(here): return brats(here, 'Gro\u0308ße', 'Größe')

@hostile(discover, reads='either', seconds=30)
def two_thousand_files_of_nobody(here):
    for k in range(2000): write(here/f'DOE_{k}.txt', b'x')
    return brats(here)


# links and other things that are no files

@hostile(discover, reads=cases(2))
def link_to_a_file_outside(here):
    secret = write(here.parent/'work'/'secret_JANE.nii.gz', gz(nifti()))
    brats(here)
    (here/'BraTS-GLI-00003-000').mkdir()
    (here/'BraTS-GLI-00003-000'/'BraTS-GLI-00003-000-t1n.nii.gz').symlink_to(secret)
    return here

@hostile(discover, reads=cases(2))
def link_to_a_folder_outside(here):
    brats(here.parent/'work'/'secret', 'BraTS-GLI-00009-000')
    (brats(here)/'more').symlink_to(here.parent/'work'/'secret', target_is_directory=True)
    return here

@hostile(discover, reads=cases(2))
def link_to_itself(here):
    (brats(here)/'again').symlink_to(here, target_is_directory=True)
    return here

@hostile(discover, reads=cases(2))
def dangling_link(here):
    (brats(here)/'BraTS-GLI-00003-000-t1n.nii.gz').symlink_to(here/'nowhere_DOE')
    return here

@hostile(discover, reads=cases(2))
def named_pipe_among_the_images(here):
    os.mkfifo(brats(here)/'BraTS-GLI-00003-000-t1n.nii.gz')
    return here

@hostile(discover, reads=cases(2))
def folder_named_like_an_image(here):
    (brats(here)/'BraTS-GLI-00003-000-t1n.nii.gz').mkdir()
    return here


# lists of images

@hostile(discover, reads=cases(3))
def unhurt_table(here): return table(here, *(f'DOE_JANE_{k}.png,{"HC" if k else "TLE"},MRN-4711-{k}' for k in range(3)))

@hostile(discover, reads=cases(3))
def table_with_a_byte_order_mark(here):
    table(here, *(f'DOE_JANE_{k}.png,HC,MRN-4711-{k}' for k in range(3)))
    write(here/'labels.csv', b'\xef\xbb\xbf' + (here/'labels.csv').read_bytes().replace(b'\n', b'\r\n'))
    return here

@hostile(discover, '1 of|row')
def path_that_climbs_out(here):
    write(here.parent/'work'/'DOE.png', png())
    return table(here, '../work/DOE.png,HC,MRN-4711')

@hostile(discover)
def absolute_path(here): return table(here, f'{write(here.parent/"work"/"DOE.png", png())},HC,MRN-4711')

@hostile(discover, reads='either')
def path_through_a_link(here):
    write(here.parent/'work'/'DOE.png', png())
    (here/'door').symlink_to(here.parent/'work', target_is_directory=True)
    return table(here, 'door/DOE.png,HC,MRN-4711', 'DOE_JANE_0.png,TLE,MRN-4711-0')

@hostile(discover)
def path_with_backslashes_that_climbs_out(here): return table(here, '..\\..\\DOE.png,HC,MRN-4711', '\\\\server\\JANE.png,HC,MRN-4711')

@hostile(discover)
def paths_to_nothing(here): return table(here, 'gone_DOE.png,HC,MRN-4711')

@hostile(discover)
def table_without_rows(here): return table(here)

@hostile(discover, reads='either')
def table_of_other_columns(here): return table(here, 'DOE_JANE_0.png,HC', head='file,group')

@hostile(discover, reads='either')
def rows_too_short_and_too_long(here): return table(here, 'DOE_JANE_0.png', 'DOE_JANE_1.png,HC,MRN-4711,more,JANE', ',,', 'DOE_JANE_2.png,HC,MRN-4711')

@hostile(discover)
def one_image_of_two_patients(here): return table(here, 'DOE_JANE_0.png,HC,MRN-4711', 'DOE_JANE_0.png,TLE,MRN-4712')

@hostile(discover, reads='either')
def nul_bytes_in_the_table(here): return table(here, 'DOE_JANE_0.png\0,HC,MRN-4711')

@hostile(discover, reads='either')
def table_that_is_not_text(here): return table(here, 'DOE_JANE_0.png,\udcff\udcfe,MRN-4711')

@hostile(discover, reads='either')
def table_in_utf_16(here):
    table(here, 'DOE_JANE_0.png,HC,MRN-4711')
    write(here/'labels.csv', (here/'labels.csv').read_text().encode('utf-16'))
    return here

@hostile(discover, reads='either')
def field_of_ten_megabytes(here): return table(here, f'DOE_JANE_0.png,"{"x"*10**7}",MRN-4711')

@hostile(discover, reads='either')
def quote_that_is_never_closed(here): return table(here, '"DOE_JANE_0.png,HC,MRN-4711', 'DOE_JANE_1.png,HC,MRN-4712')

@hostile(discover, 'two|2|split')
def one_patient_in_two_splits(here):
    write(here/'train'/'sub-DOE_1.png', png())
    write(here/'val'/'sub-DOE_2.png', png())
    write(here/'train'/'sub-JANE_1.png', png())
    return here


# Decathlon

@hostile(discover, reads=cases(2))
def unhurt_task(here): return task(here)

@hostile(discover)
def json_cut_in_half(here):
    raw = (task(here)/'dataset.json').read_bytes()
    return write(here/'dataset.json', raw[:len(raw)//2]).parent

@hostile(discover, seconds=20)
def json_nested_100000_deep(here): return write(task(here)/'dataset.json', b'['*100_000 + b']'*100_000).parent

@hostile(discover, reads='either')
def json_that_is_a_number(here): return write(task(here)/'dataset.json', b'4711').parent

@hostile(discover, reads='either')
def json_with_an_integer_of_5000_digits(here): return write(task(here)/'dataset.json', b'{"modality": {"0": "MRI"}, "training": [' + b'7'*5000 + b']}').parent

@hostile(discover, reads='either')
def json_that_is_not_text(here): return write(task(here)/'dataset.json', b'\xff\xfe{"training": []}').parent

@hostile(discover, reads='either')
def training_that_is_no_list(here): return task(here, training='DOE')

@hostile(discover, reads='either')
def training_of_numbers_and_nulls(here): return task(here, training=[1, None, {'image': 7, 'label': None}, ['DOE'], {}])

@hostile(discover, reads='either')
def modality_that_is_no_table(here): return task(here, modality=['MRI', 'DOE'])

@hostile(discover, 'entry|1 of')
def image_that_climbs_out(here):
    write(here.parent/'work'/'DOE.nii.gz', gz(nifti()))
    return task(here, training=[{'image': '../work/DOE.nii.gz', 'label': '../work/DOE.nii.gz'}])

@hostile(discover)
def image_with_an_absolute_path(here): return task(here, training=[{'image': '/etc/passwd_DOE.nii.gz', 'label': '/etc/shadow.nii.gz'}])

@hostile(discover, reads='either')
def images_that_are_gone(here): return task(here, training=[{'image': './imagesTr/gone_DOE.nii.gz', 'label': './labelsTr/gone_DOE.nii.gz'}])


# arrays

class Bomb:
    "Unpickling it leaves a mark."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (self.mark, 'w')

def npy(data):
    import io
    buffer = io.BytesIO()
    np.save(buffer, data)
    return buffer.getvalue()

LATENT = np.zeros((4, 5, 6, 7), np.float32)

@hostile(discover, reads=cases(2))
def unhurt_latents(here):
    for k in range(2): write(here/f'sub-DOE{k}_latent.npy', npy(LATENT))
    return here

@hostile(discover, reads='either')
def array_that_is_a_pickle(here):
    write(here/'sub-DOE1_latent.npy', pickle.dumps(Bomb(str(here.parent/'unpickled'))))
    return write(here/'sub-DOE2_latent.npy', npy(LATENT)).parent

@hostile(discover)
def array_of_objects(here):
    data = np.empty((1, 1, 1, 1), object)
    data[0, 0, 0, 0] = Bomb(str(here.parent/'unpickled'))
    return write(here/'sub-DOE1_latent.npy', npy(data)).parent

def npy_headed(text): return b'\x93NUMPY\1\0' + (len(text) + 1).to_bytes(2, 'little') + text.encode() + b'\n'

@hostile(discover, mb=60)
def array_that_declares_a_petabyte(here):
    return write(here/'sub-DOE_latent.npy', npy_headed("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 99999, 99999, 9999)}")).parent

@hostile(discover)
def array_header_that_is_code(here):
    return write(here/'sub-DOE_latent.npy', npy_headed(f"{{'descr': open('{here.parent}/ran', 'w'), 'fortran_order': False, 'shape': (1, 2, 3, 4)}}")).parent

@hostile(discover)
def array_of_a_negative_shape(here):
    return write(here/'sub-DOE_latent.npy', npy_headed("{'descr': '<f4', 'fortran_order': False, 'shape': (4, -5, 6, -7)}") + bytes(4000)).parent

@hostile(discover)
def array_cut_in_half(here): return write(here/'sub-DOE_latent.npy', npy(LATENT)[:1000]).parent


# zips, and layouts that look alike

@hostile(discover, reads=cases(1))
def one_good_zip_among_bad_ones(here):
    pair = {f'DOE/{d}/{inner(k)}': dicom(dataset(k, series=int(d))) for d in '12' for k in range(SLICES)}
    archive(here/'HC'/'good.zip', pair)
    archive(here/'HC'/'slip_DOE.zip', {**pair, '../../slipped_DOE.dcm': b'x'})
    archive(here/'TLE'/'one_DOE.zip', {f'DOE/1/{inner(0)}': b'x'})
    write(here/'TLE'/'cut_DOE.zip', (here/'HC'/'good.zip').read_bytes()[:700])
    write(here/'TLE'/'text_DOE.zip', b'MRN-4711')
    return here

@hostile(discover)
def zips_without_pairs(here): return archive(here/'DOE.zip', {f'JANE/{inner(0)}': b'x'}).parent

@hostile(discover, 'decathlon.*hc_tle|hc_tle.*decathlon')
def two_layouts_at_once(here): return table(task(here), 'DOE_JANE_0.png,HC,MRN-4711', 'DOE_JANE_1.png,TLE,MRN-4712')


@pytest.mark.parametrize('case', hostile, ids=lambda c: c.name)
def test_layout(case, ground): judge(case, ground)


def test_a_link_in_the_list_is_not_a_way_out(ground):
    "Whatever `path_through_a_link` finds lies inside the folder."
    out = put(lambda given: [str(p.resolve()) for c in discover(given).cases for p in c.files.values()], path_through_a_link(ground/'given'), ground)
    assert out.error or 'work' not in out.value['text']
