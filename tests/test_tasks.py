"Tasks, saved models and restored images with real files and real processes: what the pages 06a0 to 06a leave open."
import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from sbldm_nb.cohort import Cohort, make_subject
from sbldm_nb.ct import Geometry, pseudo_ct
from sbldm_nb.data import Cache, preprocess, read_image, write_image
from sbldm_nb.datasets import InpaintingTriples, ThickThinPairs
from sbldm_nb.dit3d import DiT3D
from sbldm_nb.ldm import LatentDiffusion, load_vae, numbers_written, save_vae, write_samples
from sbldm_nb.restoring import project_slabs, slab_matrix
from sbldm_nb.schedules import get_schedule
from sbldm_nb.tasks import ClassConditional, Inpainting, Interpolation, SlicePosition, Unconditional, cells_of, fill_void, with_slices
from sbldm_nb.unet3d import UNet
from sbldm_nb.vae import AutoencoderKL, LatentSpace

FLAT = dict(strides=((2, 2, 1),), stem_patch=(2, 2, 1))  # keeps the depth


def space(seed=0, **kwargs):
    torch.manual_seed(seed)
    return LatentSpace(AutoencoderKL(**{**dict(dims=3, latent_channels=4, channels=(8, 8)), **kwargs}))


def model(task, latent=None, schedule='flow', size=(16, 16, 12), **kwargs):
    latent = latent or space()
    torch.manual_seed(1)
    dims = latent.vae.config['dims']
    net = UNet(dims=dims, in_channels=4, channels=(8, 16), attention=(False, True), **task.needs(latent))
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.1)  # what starts at zero: head, and the embedding's effect
    return LatentDiffusion(latent, net, get_schedule(schedule), task, size=size[:dims], **kwargs)


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    home = tmp_path_factory.mktemp('people')
    Cohort(3, seed=0, spacing=5.).write(home / 'holes', layout='inpainting')
    preprocess(home / 'holes', home / 'cache')
    return Cache(home / 'cache')


def pairs(n=2):
    head = pseudo_ct(3, shape=(32, 32, 110), spacing=(6., 6., 1.)).slicer[:, :, 20:100]
    return next(iter(DataLoader(ThickThinPairs([head], 'slab5', size=32, patches_per_case=n), n)))


# ---- tasks


def batches(people):
    triples = InpaintingTriples(people, None, ('growth', 'tissue'))
    image = torch.rand(2, 1, 17, 14, 12) * 2 - 1
    yield Unconditional(), dict(image=image), {}
    yield SlicePosition(drop=.5), dict(image=image, position=torch.tensor([.1, .2])), {}
    yield ClassConditional(('HC', 'TLE')), dict(image=image, label=torch.tensor([0, 1])), {}
    for residual in (False, True): yield Interpolation(drop=.3, residual=residual), pairs(), FLAT
    for extra in ((), ('tissue',), ('growth', 'tissue')): yield Inpainting(extra=extra), {k: v[None] for k, v in triples[0].items()}, {}


def test_every_task_trains_every_denoiser(people):
    for task, batch, vae in batches(people):
        latent = space(**vae)
        z, cond = task.prepare(batch, latent, torch.Generator().manual_seed(0))
        wide = dict(input_size=z.shape[2:], hidden_size=48, depth=1, num_heads=2, patch_size=2)
        for net in (UNet(dims=3, channels=(8, 8), attention=(False, False), **task.needs(latent)), DiT3D(**wide, **task.needs(latent))):
            made = LatentDiffusion(latent, net, get_schedule('flow'), task, size=batch.get('image', batch.get('target')).shape[2:])
            losses = [made.loss(batch, torch.Generator().manual_seed(5)) for _ in range(2)]
            assert losses[0].isfinite() and torch.equal(*losses)
            losses[0].backward()
            assert all(p.grad is not None for p in net.parameters()), type(task)
            shown = made.preview(batch, torch.Generator().manual_seed(0))
            assert shown['sample'].shape == shown['truth'].shape == (1, *batch.get('image', batch.get('target')).shape[1:])
            assert made.training and shown['sample'].isfinite().all()


def test_loss_of_inpainting_is_taken_where_truth_is_known(people):
    task, latent = Inpainting(), space()
    batch = next(iter(DataLoader(InpaintingTriples(people, None), 1)))
    made = model(task, latent)
    z, cond = task.prepare(batch, latent, torch.Generator().manual_seed(0))
    assert torch.equal(cond.mask, cells_of(batch['weight'], latent.vae.downsampling, 1)) and cond.mask.any() and not cond.mask.all()
    value, g = made.loss(batch, torch.Generator().manual_seed(3)), torch.Generator().manual_seed(3)
    z, cond = task.prepare(batch, latent, g)
    t = torch.sigmoid(torch.randn(1, generator=g)).double()
    noise = torch.randn(z.shape, generator=g)
    index = made.schedule.sigma.sub(t.float()).abs().argmin()[None]
    candidates = []
    for k in (index - 1, index, index + 1):  # how a time rounds to the table is the loss's business
        k = k.clamp(0, made.schedule.num_timesteps - 1)
        answer = made.denoiser(made.schedule.add_noise(z, noise, k), k, cond)
        candidates.append((answer - (noise - z)).square()[cond.mask.expand_as(z)].mean().item())
    assert min(abs(c - value.item()) for c in candidates) < 1e-5


def test_latents_of_a_cache_need_no_image_to_encode():
    latent, z = space(), torch.randn(2, 4, 4, 4, 3)
    for task, batch in ((Unconditional(), {}), (ClassConditional(), dict(label=torch.tensor([0, 2]))), (SlicePosition(), dict(position=torch.zeros(2)))):
        assert torch.equal(task.prepare(dict(latent=z, **batch), latent)[0], z)
    thin = torch.randn(2, 4, 8, 8, 40)
    assert torch.equal(Interpolation().prepare(pairs() | dict(latent=thin), space(**FLAT))[0], thin)


def slow_fill(image, void):
    "Pull-push of one channel in NumPy, level by level, with SciPy's interpolation."
    from scipy.ndimage import map_coordinates
    total, share = np.where(void, 0, image), (~void).astype(float)
    if not share.all() and max(share.shape) > 1:
        def pool(v):
            v = np.pad(v, [(0, n % 2) for n in v.shape])
            return v.reshape(*(k for n in v.shape for k in (n // 2, 2))).mean(tuple(range(1, 2 * v.ndim, 2)))
        coarse_total, coarse_share = pool(total), pool(share)
        coarse = slow_fill(coarse_total / np.where(coarse_share > 0, coarse_share, 1), coarse_share == 0) if (coarse_share == 0).any() else coarse_total / coarse_share
        at = np.meshgrid(*[(np.arange(n) + .5) / 2 - .5 for n in image.shape], indexing='ij')
        return np.where(void, map_coordinates(coarse, at, order=1, mode='nearest'), image)
    return np.where(void, 0, image)


@pytest.mark.parametrize('shape', [(8, 8), (7, 9), (4, 8, 4)])
def test_one_level_of_filling_is_what_numpy_and_scipy_make_of_it(shape):
    rng = np.random.default_rng(0)
    image, void = rng.normal(size=shape), np.zeros(shape, bool)
    void.flat[rng.choice(np.flatnonzero(np.indices(shape).sum(0) % 2), 5, replace=False)] = True  # no block of voxels is void as a whole
    ours = fill_void(torch.from_numpy(image)[None, None], torch.from_numpy(void)[None, None])[0, 0].numpy()
    np.testing.assert_allclose(ours, slow_fill(image, void), atol=1e-12)


@pytest.mark.parametrize('shape', [(9, 6), (10, 7, 5)])
def test_filling_stays_within_its_surroundings_and_ignores_the_rest_of_the_batch(shape):
    g = torch.Generator().manual_seed(0)
    image, void = torch.randn(3, 2, *shape, generator=g), torch.rand(3, 1, *shape, generator=g) > .3
    void[1] = True
    void[1].flatten()[0] = False
    filled = fill_void(image, void)
    for k in range(3):
        assert_close(fill_void(image[k:k + 1], void[k:k + 1]), filled[k:k + 1])
        for c in range(2):
            known = image[k, c][~void[k, 0]]
            assert known.min() - 1e-5 <= filled[k, c].min() and filled[k, c].max() <= known.max() + 1e-5
    assert_close(filled[1], image[1].flatten(1)[:, :1].reshape(2, *[1] * len(shape)).expand_as(filled[1]))


def test_wrong_networks_get_a_sentence():
    latent = space()
    for task, says in ((Interpolation(), 'the task Interpolation gives 4 channels of condition, the UNet takes 0'),
                       (SlicePosition(), 'gives a vector of 1 numbers, the UNet takes 0'), (ClassConditional(), 'gives 3 classes, the UNet takes 0')):
        with pytest.raises(ValueError, match=says): LatentDiffusion(latent, UNet(), get_schedule('flow'), task)
    with pytest.raises(ValueError, match='latents of 4 channels, the UNet takes 8'): LatentDiffusion(latent, UNet(in_channels=8), get_schedule('flow'), Unconditional())


# ---- sampling


def test_volumes_of_classes_in_any_batches_and_shards():
    made = model(ClassConditional(), schedule='cosine', size=(13, 16, 11))
    labels, kw = ['HC', 'TLE-R', 'TLE-L', 'HC', 'HC'], dict(steps=4, cfg=1.5, seed=7)
    for sampler in ('ddim', 'ddpm', 'dpm', 'heun'):
        whole = made.sample(5, label=labels, sampler=sampler, **kw)
        parts = [made.sample(2, label=labels[:2], sampler=sampler, **kw), made.sample(3, label=labels[2:], first=2, batch_size=1, sampler=sampler, **kw)]
        assert whole.shape == (5, 1, 13, 16, 11)
        assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    assert (made.sample(1, label='HC', **kw) - made.sample(1, label='TLE-L', **kw)).abs().max() > 1e-4
    assert (made.sample(1, label='HC', **kw) - made.sample(1, label='HC', **{**kw, 'seed': 8})).abs().max() > 1e-2


SHARD = '''
import sys, torch
from sbldm_nb.ldm import LatentDiffusion, write_samples
model, out, first, n = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
write_samples(LatentDiffusion.from_pretrained(model).sample(n, steps=3, seed=1, first=first), out, first=first)
'''


def test_two_processes_draw_what_one_would(tmp_path):
    made = model(Unconditional())
    made.save_pretrained(tmp_path / 'model')
    jobs = [subprocess.Popen([sys.executable, '-c', SHARD, tmp_path / 'model', tmp_path / 'out', str(first), str(n)]) for first, n in ((0, 2), (2, 1))]
    assert [j.wait(120) for j in jobs] == [0, 0] and numbers_written(tmp_path / 'out') == [0, 1, 2]
    whole = made.eval().sample(3, steps=3, seed=1)
    for k in range(3):
        img = read_image(tmp_path / 'out' / f'simulated_{k:04}.nii.gz')
        assert img.header['descrip'].item().startswith(b'SIMULATED')
        np.testing.assert_allclose(img.get_fdata() * 2 - 1, whole[k, 0], atol=1e-4)


# ---- folders


def leaves(value, path=()):
    if isinstance(value, dict): yield from (leaf for k, v in value.items() for leaf in leaves(v, (*path, k)))
    elif isinstance(value, list): yield from (leaf for k, v in enumerate(value) for leaf in leaves(v, (*path, k)))
    if path: yield path


def changed(config, path, value):
    config = json.loads(json.dumps(config))
    here = config
    for k in path[:-1]: here = here[k]
    if value is KeyError: here.pop(path[-1])
    else: here[path[-1]] = value
    return config


def test_no_tampered_configuration_does_anything_but_load_or_say_a_sentence(tmp_path):
    made = model(ClassConditional())
    made.save_pretrained(tmp_path / 'model')
    path = tmp_path / 'model' / 'config.json'
    config, refused, loaded, rng = json.loads(path.read_text()), 0, 0, random.Random(0)
    for leaf in leaves(config):
        for value in rng.sample((KeyError, None, -1, 10**9, 10**30, float('nan'), 'os.system', [], {}, [[[1]]], True), 4):
            path.write_text(json.dumps(changed(config, leaf, value)))
            start = time.monotonic()
            try: back = LatentDiffusion.from_pretrained(path.parent)
            except (ValueError, FileNotFoundError) as e:
                assert '\n' not in str(e).strip() or 'does not take' in str(e), (leaf, value, e)
                refused += 1
            else:
                assert torch.equal(back.denoiser.stem.weight, made.denoiser.stem.weight)
                loaded += 1
            assert time.monotonic() - start < 20, (leaf, value)
    assert refused > 3 * loaded, (refused, loaded)


def test_damaged_weights_are_refused(tmp_path):
    latent = space()
    save_vae(latent.vae, tmp_path / 'vae', latent)
    file = tmp_path / 'vae' / 'model.safetensors'
    assert file.stat().st_mode & 0o777 == (tmp_path / 'vae').stat().st_mode & 0o666
    raw = file.read_bytes()
    for spoiled in (b'', raw[:5], raw[:len(raw) // 2], raw[:-1], raw + b'x', raw[:-9] + bytes([raw[-9] ^ 64]) + raw[-8:], b'\xff' * 100):
        file.write_bytes(spoiled)
        with pytest.raises(ValueError, match='damaged'): load_vae(tmp_path / 'vae')
        config = json.loads((tmp_path / 'vae' / 'config.json').read_text())
    file.unlink()
    with pytest.raises(FileNotFoundError, match='is not there'): load_vae(tmp_path / 'vae')
    assert not json.dumps(config).count(str(tmp_path))


def test_a_folder_that_is_no_model_stays_as_it_is(tmp_path):
    (tmp_path / 'file').write_text('a')
    with pytest.raises(ValueError, match='no model'): save_vae(space().vae, tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'a' and len(list(tmp_path.iterdir())) == 1
    (tmp_path / 'other').mkdir()
    for text, says in (('{"format": "diffusers"}', 'does not describe'), ('[1]', 'does not describe'), ('{', 'no readable|not readable'), ('[' * 10**5, 'not readable')):
        (tmp_path / 'other' / 'config.json').write_text(text)
        with pytest.raises(ValueError, match=says): load_vae(tmp_path / 'other')


AGAIN = '''
import sys, torch
from sbldm_nb.ldm import save_vae
from sbldm_nb.vae import AutoencoderKL, LatentSpace
vae = AutoencoderKL(dims=3, channels=(32, 64))
print('ready', flush=True)
while True: save_vae(vae, sys.argv[1])
'''


def test_killed_while_saving_leaves_a_whole_model_or_none(tmp_path):
    rng = random.Random(0)
    for _ in range(3):
        job = subprocess.Popen([sys.executable, '-c', AGAIN, tmp_path / 'model'], stdout=subprocess.PIPE)
        assert job.stdout.readline().strip() == b'ready'
        time.sleep(rng.uniform(.02, .3))
        job.send_signal(signal.SIGKILL)
        job.wait()
        whole = [p for p in [tmp_path / 'model', *tmp_path.glob('.model.*.old')] if (p / 'config.json').is_file()]
        assert whole or not list(tmp_path.glob('*'))
        for p in whole: assert load_vae(p).vae.config['channels'] == [32, 64]


def test_models_of_before_this_format_load(tmp_path):
    made = model(SlicePosition(), space(dims=2))
    made.save_pretrained(tmp_path / 'model')
    path = tmp_path / 'model' / 'config.json'
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ('files', 'base')}))
    back = LatentDiffusion.from_pretrained(tmp_path / 'model')
    assert torch.equal(back.sample(1, positions=.1, steps=2), made.eval().sample(1, positions=.1, steps=2))


# ---- restored images


def test_dicom_in_thin_slices_out_at_the_place_of_the_real_ones(tmp_path):
    source = Cohort(1, seed=1, spacing=4.).write(tmp_path / 'ct', layout='dicom_ct')
    archive = sorted(Path(source).rglob('*.zip'))[0]
    zipfile.ZipFile(archive).extractall(tmp_path / 'series')
    thick, thin = (read_image(next(p for p in (tmp_path / 'series').rglob(n) if p.is_dir())) for n in ('1', '2'))
    small = nib.Nifti1Image(np.asanyarray(thick.dataobj)[::6, ::6, :12], thick.affine @ np.diag([6, 6, 1, 1]))
    made = model(Interpolation(), space(**FLAT)).eval()
    out = made.interpolate(small, steps=2)
    A, which = slab_matrix(with_slices(made.task.geometry, 12))
    assert out.shape == (*small.shape[:2], 60) and len(which) == 12
    assert np.abs(out.get_fdata() @ A.T - small.get_fdata()).max() < 1e-4 * 400
    apart = np.linalg.solve(thin.affine[:3, :3], out.affine[:3, 3] - thin.affine[:3, 3])
    assert np.abs(apart[2] - np.rint(apart[2])) < 1e-2 and np.abs(apart[:2]).max() < 1e-2
    assert out.header['descrip'].item().startswith(b'SIMULATED')
    back = read_image(write_image(out, tmp_path / 'thin.nii.gz'))
    np.testing.assert_allclose(back.affine, out.affine, atol=1e-4)


def test_oblique_uneven_single_and_odd_stacks():
    made = model(Interpolation(), space(**FLAT)).eval()
    turn = nib.eulerangles.euler2mat(.2, -.1, .15)
    for shape in ((16, 13, 8), (9, 16, 1), (11, 10, 5), (8, 8, 9)):
        affine = nib.affines.from_matvec(turn @ np.diag([.7, 1.3, 5.]), [3, -40, 7])
        img = nib.Nifti1Image(np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16), affine)
        out = made.interpolate(img, steps=2, samples=2)
        assert out.shape == (*shape[:2], 5 * shape[2]) and np.isfinite(out.get_fdata()).all()
        middle = out.affine @ [2, 3, 5 * (shape[2] - 1) + 2, 1]
        np.testing.assert_allclose(middle, affine @ [2, 3, shape[2] - 1, 1], atol=1e-9)
        np.testing.assert_allclose(out.get_fdata().reshape(*shape, 5).mean(-1), img.get_fdata(), atol=.01)


def test_slabs_that_share_thin_slices_are_projected_too():
    g = Geometry(4, 3., 7, 2., 1.)
    A, which = slab_matrix(g)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 2, 7))
    thick = np.zeros((3, 2, 4))
    thick[..., which] = truth @ A.T
    assert len(which) >= 2 and ((A > 0).sum(0) > 1).any()
    np.testing.assert_allclose(project_slabs(rng.normal(size=truth.shape), thick, g) @ A.T, thick[..., which], atol=1e-10)


@pytest.mark.parametrize('kind', ['int16', 'uint8', 'float32', 'scaled'])
def test_known_voxels_survive_the_way_through_files(tmp_path, kind):
    person = make_subject(5, spacing=5.)
    data, hole = person.t1.get_fdata(), np.asarray(person.healthy_mask(0).dataobj) > 0
    if kind == 'uint8': data = data / data.max() * 255
    data = np.where(hole, 0, data).astype('int16' if kind == 'scaled' else kind)
    img = nib.Nifti1Image(data, person.t1.affine)
    if kind == 'scaled': img.header.set_slope_inter(.37, -5.)
    nib.save(img, tmp_path / 'in.nii.gz')
    nib.save(person.healthy_mask(0), tmp_path / 'mask.nii.gz')
    read, mask = read_image(tmp_path / 'in.nii.gz'), read_image(tmp_path / 'mask.nii.gz')
    made = model(Inpainting(extra=('tissue',)), size=data.shape).eval()
    out = made.inpaint(read, mask, extras=dict(tissue=person.tissue), steps=2, samples=2)
    back = read_image(write_image(out, tmp_path / 'out.nii.gz'))
    known = ~hole
    assert np.asanyarray(back.dataobj).dtype == np.asanyarray(read.dataobj).dtype
    assert np.array_equal(np.asanyarray(back.dataobj)[known], np.asanyarray(read.dataobj)[known])
    np.testing.assert_allclose(back.affine, read.affine, atol=1e-5)
    assert not np.array_equal(np.asanyarray(back.dataobj)[hole], np.asanyarray(read.dataobj)[hole])
    again = made.inpaint(read, mask, extras=dict(tissue=person.tissue), steps=2, samples=2)
    assert np.array_equal(np.asanyarray(again.dataobj), np.asanyarray(out.dataobj))


def test_what_cannot_be_restored_is_named():
    person = make_subject(5, spacing=5.)
    t1, mask, made = person.t1, person.healthy_mask(0), model(Inpainting(extra=('growth',)))
    with pytest.raises(ValueError, match="wants the map 'growth'"): made.inpaint(t1, mask, steps=2)
    with pytest.raises(ValueError, match='the growth has shape'): made.inpaint(t1, mask, extras=dict(growth=mask.slicer[1:]), steps=2)
    with pytest.raises(ValueError, match='Interpolation is wanted, this one is Inpainting'): made.interpolate(t1)
    with pytest.raises(ValueError, match='at least one sample is wanted, got 0'): model(Inpainting()).inpaint(t1, mask, samples=0)
    with pytest.raises(ValueError, match='slices 5 mm apart'): model(Interpolation(), space(**FLAT)).interpolate(nib.Nifti1Image(np.zeros((8, 8, 4)), np.diag([1, 1, 3, 1])))
    with pytest.raises(ValueError, match='without thick slices'): model(Interpolation(), space(**FLAT)).sample(1)
    assert made.training  # as before, though sampling stopped half way


def test_a_trained_inpainter_looks_at_its_surroundings():
    "Two kinds of volumes, bright and dark; only the surroundings tell which. Trained for seconds, the model fills a hole with the right kind."
    torch.manual_seed(0)
    latent = LatentSpace(AutoencoderKL(dims=3, latent_channels=4, channels=(8, 8)))
    with torch.no_grad(): latent.vae.encoder[-1].bias[4:] = -10  # an encoder that is sure
    value = torch.tensor([-.6, .6]).repeat(8).reshape(-1, 1, 1, 1, 1)
    image, mask = value.expand(16, 1, 16, 16, 16).clone(), torch.zeros(16, 1, 16, 16, 16)
    mask[..., 4:12, 4:12, 4:12] = 1
    with torch.no_grad(): z = latent.encode(image)
    latent.mean.copy_(z.mean((0, 2, 3, 4), keepdim=True))
    latent.std.copy_(z.std((0, 2, 3, 4), keepdim=True))
    task = Inpainting(dilate=0)
    made = LatentDiffusion(latent, UNet(dims=3, channels=(16,), attention=(False,), **task.needs(latent)), get_schedule('flow'), task, size=(16, 16, 16))
    opt, g = torch.optim.Adam(made.denoiser.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(120):
        opt.zero_grad()
        made.loss(dict(image=image, mask=mask), g).backward()
        opt.step()
    z, cond = task.prepare(dict(image=image[:2], mask=mask[:2]), latent)
    drawn = made.sample(2, cond=cond, steps=8, size=(16, 16, 16))
    with torch.no_grad(): truth = latent.decode(latent.encode(image[:2]), (16, 16, 16)).clamp(-1, 1)
    inside = mask[:2] > 0
    error, other = (drawn - truth)[inside].abs().mean(), (drawn - truth.flip(0))[inside].abs().mean()
    assert error < .5 * other, (error, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(people):
    for task, batch, vae in batches(people):
        made = model(task, space(**vae)).cuda()
        loss = made.loss({k: v.cuda() for k, v in batch.items()}, torch.Generator('cuda').manual_seed(0))
        assert loss.isfinite() and loss.device.type == 'cuda'
    made = model(ClassConditional(), schedule='cosine')
    on_cpu = made.eval().sample(2, label='HC', steps=4, sampler='ddpm')
    assert_close(made.cuda().sample(2, label='HC', steps=4, sampler='ddpm').cpu(), on_cpu, rtol=0, atol=1e-2)
