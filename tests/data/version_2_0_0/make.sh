#!/bin/sh
# Makes the files of this folder. They are of version 2.0.0: run it in a checkout of that version, with this folder's path.
#
#   sh /path/to/tests/data/version_2_0_0/make.sh /path/to/tests/data/version_2_0_0
set -e
here=$1 work=$(mktemp -d)
export OMP_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1
run() { # overlay, flags
    overlay=$1; shift
    ${PYTHON:-python} -m monai.bundle run \
        --config_file "['configs/inference.json','$overlay','configs/tiny.yaml','$here/small.yaml']" --device cpu "$@"
}

# Two raw scans: the template at 4 mm, the second one larger and turned.
${PYTHON:-python} - "$here/raw" <<'END'
import sys
from pathlib import Path
import nibabel as nib, numpy as np
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

folder = Path(sys.argv[1])
template = nib.load("models/template/tpl-MNI152NLin2009cAsym_res-01_T1w.nii.gz")
for name, scale, turned in (("sub-1", 1.0, 0), ("sub-2", 1.06, 8)):
    motion = np.eye(4)
    motion[:3, :3] = scale * Rotation.from_euler("z", turned, degrees=True).as_matrix()
    moved = nib.Nifti1Image(np.asanyarray(template.dataobj, np.float32), motion @ template.affine)
    grid = np.diag([4.0, 4.0, 4.0, 1.0])
    grid[:3, 3] = (-100, -138, -80)
    scan = resample_from_to(moved, ((50, 62, 52), grid), order=1)
    data = np.rint(np.clip(scan.get_fdata(), 0, None) * 250 / template.get_fdata().max()).astype(np.uint8)
    image = nib.Nifti1Image(data, grid)
    image.set_sform(grid, 1); image.set_qform(grid, 1)
    path = folder / name / "anat" / f"{name}_T1w.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
(folder / "participants.tsv").write_text("participant_id\tage\tsex\nsub-1\t50\tF\nsub-2\t70\tM\n")
END

# A prepared dataset.
run configs/prepare.yaml --input_dir "$here/raw" --dataset_dir "$here/dataset" --segment_with own

# Two trainings, stopped after 2 of 4 iterations, and what they come to.
train() { # stage, flags
    stage=$1; shift
    run "configs/train_$stage.yaml" --run_dir "$work/$stage" --max_epochs 2 --epoch_length 2 --batch_size 1 \
        --seed 1 --validation_fraction 0.5 --validate_every 0 --keep_checkpoints 9 "$@"
    mkdir -p "$here/$stage"
    cp "$work/$stage/checkpoint_iteration=2.pt" "$work/$stage/$stage.pt" "$here/$stage/"
}
train autoencoder --dataset_dir "$here/dataset" --perceptual_weight 0
run configs/encode_latents.yaml --dataset_dir "$here/dataset" --latents_dir "$here/latents" \
    --autoencoder_path "$here/autoencoder/autoencoder.pt" --load_old 0
train diffusion --latents_dir "$here/latents" \
    --autoencoder_path "$here/autoencoder/autoencoder.pt" --load_old 0 --ema_decay 0.5

# Two samples.
run configs/tiny.yaml --output_dir "$here/samples" --num_samples 2 --seed 1 --num_inference_steps 5 --load_old 0 \
    --autoencoder_path "$here/autoencoder/autoencoder.pt" --diffusion_path "$here/diffusion/diffusion.pt" \
    --gender 1.0 --age 0.7 --ventricular_vol 0.7 --brain_vol 0.5

# An evaluation of them, with a network of brain age whose weights are random.
PYTHONPATH=. ${PYTHON:-python} - "$here" <<'END'
import sys
import torch
from scripts.brain_age import BrainAgeNetwork

torch.manual_seed(1)
channels = [1, 1, 1, 1, 2]
network = BrainAgeNetwork((32, 48, 32), channels=channels)
facts = {"network": "brain_age", "shape": [32, 48, 32], "spacing": [5.0, 14 / 3, 5.0], "channels": channels}
facts |= {"age_mean": 60.0, "age_deviation": 10.0, "age_range": [44.0, 82.0], "trained_on": []}
torch.save({"brain_age": network.state_dict(), "facts": facts}, f"{sys.argv[1]}/brain_age.pt")
END
run configs/evaluate.yaml --synthetic_dir "$here/samples" --real_dir "$here/dataset" --reconstruct_dir "$here/dataset" \
    --autoencoder_path "$here/autoencoder/autoencoder.pt" --load_old 0 --brain_age_path "$here/brain_age.pt" \
    --output_dir "$work/evaluation"
mkdir -p "$here/evaluation"
cp -R "$work/evaluation/values" "$work/evaluation/features" "$here/evaluation/"

# What no test needs, and checkpoints in less room.
rm -rf "$here"/samples/*.png "$here/dataset/logs"
gzip --no-name --best "$here"/*.pt "$here"/*/*.pt
