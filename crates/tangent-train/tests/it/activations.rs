//! Training beside frozen layers: stored hidden states change no bit, and what is wrong with them is
//! told or mended.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use burn::tensor::Device;
use tangent_model::family::Model;
use tangent_model::{Batch, Pass};
use tangent_ops::FrozenMatrix;
use tangent_peft::{Adapter, AdapterConfig, SettingValue, attach};
use tangent_testkit::{folder, model};
use tangent_train::TrainError;
use tangent_train::activations::{self, LIMIT, Storage, Survey};
use tangent_train::config::{Batching, TrainConfig};
use tangent_train::data::Example;
use tangent_train::gradients::{Accumulated, accumulate, of_step};
use tangent_train::sampler::epoch_steps;

use crate::rows;

const BASE: &str = "llama/everything";

/// The stored rows, some that share a beginning with them, and one twice.
fn examples() -> Vec<Example> {
    let mut rows = rows::stored();
    let (tokens, supervised) = rows[0].clone();
    rows.push((tokens.clone(), supervised.clone()));
    for (end, last) in [(8, 40), (8, 41), (3, 7)] {
        // The last target is predicted and not computed.
        let tokens = [&tokens[..end], &[last, 2]].concat();
        let supervised = [&supervised[..end], &[true; 2]].concat();
        rows.push((tokens, supervised));
    }
    rows::examples_of(rows)
}

/// A model and a side network away from its start.
fn attached(state_type: &'static str) -> (Box<dyn Model>, Adapter) {
    let mut model = model(&folder(BASE));
    let config = AdapterConfig {
        method: "lst".into(),
        dropout: 0.1,
        own: [
            ("reduction_factor".to_owned(), SettingValue::Number(2.0)),
            ("state_type".to_owned(), SettingValue::text(state_type)),
        ]
        .into(),
        ..AdapterConfig::default()
    };
    let adapter = attach(&mut *model, &config, 5).unwrap();
    for parameter in &adapter.parameters {
        parameter.update(|values| {
            for (i, v) in values.iter_mut().enumerate() {
                *v += 0.05 * ((i % 13) as f32 - 6.0);
            }
        });
    }
    (model, adapter)
}

fn storage(folder: &Path) -> Storage {
    Storage {
        folder: folder.to_owned(),
        limit: LIMIT,
    }
}

/// Stores the states of all rows for a model of its own and tells what was there before.
fn stored(
    model: &mut dyn Model,
    rows: &[Example],
    storage: &Storage,
) -> Result<Survey, TrainError> {
    let mut found = None;
    let stop = AtomicBool::new(false);
    activations::attach(model, rows, storage, &stop, &mut |survey| {
        found = Some(survey.clone());
    })?;
    Ok(found.unwrap())
}

/// Losses and trained values of two passes over the rows.
fn trained(model: &dyn Model, adapter: &Adapter, rows: &[Example]) -> (Vec<f64>, Vec<Vec<f32>>) {
    let config = TrainConfig {
        batching: Batching::Rows(3),
        ..TrainConfig::default()
    };
    let steps = (0..2).flat_map(|epoch| epoch_steps(rows, &config, epoch));
    let mut losses = vec![];
    for (index, micro_batches) in steps.enumerate() {
        let step = of_step(
            model,
            adapter,
            &config,
            rows,
            &micro_batches,
            index + 1,
            None,
        )
        .unwrap();
        for (parameter, gradient) in adapter.parameters.iter().zip(&step.gradients) {
            let gradient = gradient.as_ref().unwrap();
            parameter.update(|values| {
                for (v, g) in values.iter_mut().zip(gradient) {
                    *v -= 0.01 * g;
                }
            });
        }
        losses.push(step.loss);
    }
    let values = adapter.parameters.iter().map(|p| p.values());
    (losses, values.collect())
}

/// The bytes of the only file of states.
fn states_file(folder: &Path) -> PathBuf {
    assert!(!folder.join("states-00001.bin").exists());
    folder.join("states-00000.bin")
}

fn flip(path: &Path, at: u64) {
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte[0] ^ 1]).unwrap();
}

#[test]
fn stored_states_change_no_bit_and_the_layers_never_run() {
    let rows = examples();
    for state_type in ["f32", "bf16"] {
        let (live, adapter) = attached(state_type);
        let want = trained(&*live, &adapter, &rows);
        let dir = tempfile::tempdir().unwrap();
        for (run, found) in [0, 6].into_iter().enumerate() {
            let (mut model, adapter) = attached(state_type);
            let survey = stored(&mut *model, &rows, &storage(dir.path())).unwrap();
            assert_eq!((survey.rows, survey.found), (6, found));
            assert!(survey.damaged.is_empty());
            let size = fs::metadata(states_file(dir.path())).unwrap().len();
            assert_eq!(survey.bytes, size);
            for site in model.sites_mut() {
                // Whatever ran through these layers would be nothing.
                if site.layer.is_some() {
                    let (rows, cols) = (site.weight.rows(), site.weight.cols());
                    site.weight = FrozenMatrix::from_values(vec![0.0; rows * cols], rows, cols);
                }
            }
            let got = trained(&*model, &adapter, &rows);
            assert!(got == want, "{state_type}, run {run}");
        }
    }
}

#[test]
fn what_no_target_depends_on_is_not_stored() {
    let rows = examples();
    let (whole, more) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut model, adapter) = attached("f32");
    let survey = stored(&mut *model, &rows, &storage(whole.path())).unwrap();
    let want = trained(&*model, &adapter, &rows);
    let mut longer = rows.clone();
    for row in &mut longer {
        row.tokens.extend([3, 50]);
        row.supervised.extend([false; 2]);
    }
    let (mut model, adapter) = attached("f32");
    let same = stored(&mut *model, &longer, &storage(more.path())).unwrap();
    assert_eq!((same.rows, same.bytes), (survey.rows, survey.bytes));
    assert!(trained(&*model, &adapter, &longer) == want);
    // The states are those of the rows that end earlier, and of no others.
    let again = stored(&mut *model, &longer, &storage(whole.path())).unwrap();
    assert_eq!(again.found, survey.rows);
    for row in &mut longer {
        row.supervised.fill(true);
    }
    let other = stored(&mut *model, &longer, &storage(whole.path())).unwrap_err();
    let other = other.to_string();
    assert!(other.contains("other training rows"), "{other}");
    // Nothing is computed of a row without a target.
    longer.truncate(2);
    longer[1].supervised.fill(false);
    let empty = tempfile::tempdir().unwrap();
    let one = stored(&mut *model, &longer, &storage(empty.path())).unwrap();
    assert_eq!(one.rows, 1);
}

#[test]
fn an_interrupted_folder_is_continued() {
    let rows = examples();
    let (complete, partial) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut model, _adapter) = attached("f32");
    stored(&mut *model, &rows, &storage(complete.path())).unwrap();
    let stop = AtomicBool::new(true);
    activations::attach(
        &mut *model,
        &rows,
        &storage(partial.path()),
        &stop,
        &mut |_| {},
    )
    .unwrap();
    let survey = stored(&mut *model, &rows, &storage(partial.path())).unwrap();
    assert_eq!((survey.found, survey.damaged.len()), (0, 0));
    let want = fs::read(states_file(complete.path())).unwrap();
    assert!(fs::read(states_file(partial.path())).unwrap() == want);

    let file = File::options()
        .write(true)
        .open(states_file(partial.path()));
    let half = survey.bytes / 2;
    file.unwrap().set_len(half).unwrap();
    let survey = stored(&mut *model, &rows, &storage(partial.path())).unwrap();
    assert!((1..6).contains(&survey.found), "{survey:?}");
    assert!(survey.damaged.is_empty(), "{survey:?}");
    assert!(fs::read(states_file(partial.path())).unwrap() == want);
}

#[test]
fn damaged_rows_are_named_and_computed_again() {
    let rows = examples();
    let dir = tempfile::tempdir().unwrap();
    let (mut model, _adapter) = attached("f32");
    let survey = stored(&mut *model, &rows, &storage(dir.path())).unwrap();
    let path = states_file(dir.path());
    let want = fs::read(&path).unwrap();
    flip(&path, survey.bytes - 3);
    let survey = stored(&mut *model, &rows, &storage(dir.path())).unwrap();
    // The last row in the order of tokens begins with 17.
    assert_eq!(survey.damaged, ["rows.jsonl:3"]);
    assert_eq!(survey.found, 5);
    assert!(fs::read(&path).unwrap() == want);

    // What is damaged while a run reads it is computed in its place.
    let (live, adapter) = attached("f32");
    let live = trained(&*live, &adapter, &rows);
    let (mut model, adapter) = attached("f32");
    stored(&mut *model, &rows, &storage(dir.path())).unwrap();
    for at in [100, survey.bytes / 2, survey.bytes - 3] {
        flip(&path, at);
    }
    assert!(trained(&*model, &adapter, &rows) == live);
}

#[test]
fn files_that_did_not_change_since_all_was_there_are_not_read_through() {
    let rows = examples();
    let dir = tempfile::tempdir().unwrap();
    let (mut model, _adapter) = attached("f32");
    let whole = stored(&mut *model, &rows, &storage(dir.path())).unwrap();
    let path = states_file(dir.path());
    let past = SystemTime::now() - Duration::from_secs(3600);
    let changed_at = |time| {
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(time).unwrap();
    };
    let survey = |model: &mut dyn Model| stored(model, &rows, &storage(dir.path())).unwrap();
    // Another time than was noted: the file is read, and its time noted.
    changed_at(past);
    assert_eq!(survey(&mut *model).found, 6);
    flip(&path, whole.bytes - 3);
    changed_at(past);
    let trusted = survey(&mut *model);
    assert_eq!((trusted.found, trusted.damaged.len()), (6, 0));
    // What is damaged all the same is computed in its place.
    let (live, adapter) = attached("f32");
    let live = trained(&*live, &adapter, &rows);
    let (mut again, adapter) = attached("f32");
    survey(&mut *again);
    assert!(trained(&*again, &adapter, &rows) == live);
    // A file that changed is read through, one that is as old as the note as well.
    changed_at(past + Duration::from_secs(60));
    assert_eq!(survey(&mut *model).damaged, ["rows.jsonl:3"]);
    flip(&path, whole.bytes - 3);
    assert_eq!(survey(&mut *model).damaged, ["rows.jsonl:3"]);
}

#[test]
fn folders_of_something_else_are_refused() {
    let rows = examples();
    let dir = tempfile::tempdir().unwrap();
    let (mut model, _adapter) = attached("f32");
    stored(&mut *model, &rows, &storage(dir.path())).unwrap();
    let fewer = stored(&mut *model, &rows[..2], &storage(dir.path()));
    let fewer = fewer.unwrap_err().to_string();
    assert!(fewer.contains("other training rows"), "{fewer}");
    let (mut rounding, _adapter) = attached("bf16");
    let rounding = stored(&mut *rounding, &rows, &storage(dir.path()));
    let rounding = rounding.unwrap_err().to_string();
    assert!(rounding.contains("another state_type"), "{rounding}");
    // One value of one weight.
    let (mut other, _adapter) = attached("f32");
    let mut sites = other.sites_mut();
    let site = sites.iter_mut().find(|s| s.path.ends_with("1.mlp.up_proj"));
    let site = site.unwrap();
    let (d_out, d_in) = (site.weight.rows(), site.weight.cols());
    let mut values = site.weight.to_values();
    values[7] += 1e-3;
    site.weight = FrozenMatrix::from_values(values, d_out, d_in);
    let other = stored(&mut *other, &rows, &storage(dir.path()));
    let other = other.unwrap_err().to_string();
    assert!(other.contains("another model"), "{other}");
    assert!(other.contains(&dir.path().display().to_string()), "{other}");
}

#[test]
fn the_limit_is_kept_before_anything_is_written() {
    let rows = examples();
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage {
        folder: dir.path().join("states"),
        limit: 4000,
    };
    let (mut model, _adapter) = attached("f32");
    let error = stored(&mut *model, &rows, &storage).unwrap_err();
    assert!(error.to_string().contains("--cache-limit"), "{error}");
    assert!(!storage.folder.exists());
}

#[test]
fn methods_inside_of_the_layers_have_no_states_to_store() {
    let rows = examples();
    let dir = tempfile::tempdir().unwrap();
    let mut model = model(&folder(BASE));
    attach(&mut *model, &AdapterConfig::default(), 0).unwrap();
    let error = stored(&mut *model, &rows, &storage(dir.path())).unwrap_err();
    assert!(error.to_string().contains("--method lst"), "{error}");
}

#[test]
fn activation_checkpointing_has_no_effect() {
    let (model, adapter) = attached("f32");
    let rows = examples();
    let parts = rows.iter().map(Example::given);
    let batch = Batch::of(&*model, parts);
    let pass = Pass::training(&Device::flex(), 9);
    let gradients = |checkpointing| {
        let mut found: Accumulated = vec![None; adapter.parameters.len()];
        let parameters = &adapter.parameters;
        let loss = accumulate(
            &*model,
            &batch,
            0.1,
            &pass,
            checkpointing,
            parameters,
            &mut found,
        );
        (loss, found)
    };
    assert!(gradients(false) == gradients(true));
}
