"""The viewer on real files, in a real kernel as a browser would talk to it, and in a notebook that a machine runs."""
import base64, io, queue

import nbformat, nibabel as nib, numpy as np, pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nibabel.testing import data_path
from PIL import Image

from sbldm_nb.viewer import SliceViewer, edge_letters, render_slice, show_slices, slices_picture

WIDGET = 'application/vnd.jupyter.widget-view+json'
SETUP = '''import numpy as np
from sbldm_nb.viewer import SliceViewer, show_grid
volume = np.random.default_rng(0).random((12, 14, 16))
viewer = SliceViewer(volume)'''

@pytest.fixture
def anatomical(): return nib.load(data_path/'anatomical.nii')

@pytest.fixture
def person_at_work(monkeypatch):
    for name in ('IN_TEST', 'SBLDM_STATIC', 'KAGGLE_KERNEL_RUN_TYPE'): monkeypatch.delenv(name, raising=False)

def test_a_scan_stored_from_right_to_left_looks_like_its_ras_form(anatomical):
    assert nib.aff2axcodes(anatomical.affine) == ('L', 'A', 'S')
    flipped = nib.as_closest_canonical(anatomical)
    for plane in ('sagittal', 'coronal', 'axial'):
        np.testing.assert_array_equal(slices_picture(anatomical, plane=plane), slices_picture(flipped, plane=plane))

def test_the_brighter_side_of_a_scan_is_where_its_affine_says(anatomical):
    "Voxels left of the mid-plane in world mm are set bright; they must fill the right half of the picture."
    world = nib.affines.apply_affine(anatomical.affine, np.stack(np.indices(anatomical.shape), -1))
    left = nib.Nifti1Image((world[..., 0] < 0).astype(np.float32), anatomical.affine)
    picture = SliceViewer(left).render(index=12, window=(0, 1))[40:-40]
    half = picture.shape[1]//2
    assert edge_letters()[1] == 'L' and picture[:, half + 20:-20].min() > 250 and picture[:, 20:half - 20].max() < 5

def test_a_figure_is_written_without_a_notebook(anatomical, tmp_path):
    fig = show_slices(anatomical)
    fig.savefig(tmp_path/'slices.png')
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path/'slices.png').convert('L')), fig.picture)
    assert len(fig.png()) <= 60_000

def test_large_slices_are_drawn_at_the_right_scale():
    assert render_slice(np.zeros((512, 300)), spacing=(.5, 1.5), zoom=2).shape == (900, 512)

def test_a_batch_run_saves_posters_and_no_widget_state(person_at_work):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP), nbformat.v4.new_code_cell('viewer.controls["index"].value = 3\nviewer'),
        nbformat.v4.new_code_cell('import matplotlib.pyplot as plt\nshow_grid(volume[:, None, :, :])\nplt.show()')])
    NotebookClient(nb, timeout=120).execute()
    assert 'widgets' not in nb.metadata
    (live,), (still,) = nb.cells[1].outputs, nb.cells[2].outputs
    assert set(live.data) == {'image/png', 'text/plain'}
    assert Image.open(io.BytesIO(base64.b64decode(still.data['image/png']))).mode in 'LP' # one byte a pixel

def messages(client, until):
    "What the kernel says on its public channel up to the end of an answer."
    seen = []
    while True:
        try: m = client.get_iopub_msg(timeout=60)
        except queue.Empty: raise AssertionError(f'no end after {[s["msg_type"] for s in seen]}')
        seen.append(m)
        if m['msg_type'] == 'status' and m['content']['execution_state'] == 'idle' and m['parent_header'].get('msg_id') == until: return seen

def test_a_slider_moved_by_a_front_end_changes_the_picture(person_at_work):
    manager, client = start_new_kernel()
    try:
        client.allow_stdin = True
        seen = messages(client, client.execute(SETUP + '\nviewer'))
        assert not [m for m in seen if m['msg_type'] == 'error'], seen
        bundle = next(m for m in seen if m['msg_type'] == 'execute_result')['content']['data']
        assert {WIDGET, 'image/png'} <= set(bundle)
        models = {m['content']['comm_id']: m['content']['data']['state'] for m in seen if m['msg_type'] == 'comm_open'}
        slider = next(k for k, state in models.items() if state.get('_model_name') == 'IntSliderModel')
        image = next(k for k, state in models.items() if state.get('_model_name') == 'ImageModel')
        def move(value):
            move = client.session.msg('comm_msg', dict(comm_id=slider, data=dict(method='update', state=dict(value=value), buffer_paths=[])))
            client.shell_channel.send(move)
            return [bytes(m['buffers'][0]) for m in messages(client, move['header']['msg_id']) if m['msg_type'] == 'comm_msg'
                and m['content']['comm_id'] == image and m['buffers']]
        there, back, again = move(3), move(9), move(3)
        assert len(there) == len(back) == 1 and there == again != back
        assert np.asarray(Image.open(io.BytesIO(there[0]))).std() > 0
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
