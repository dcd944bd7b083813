//! Adapters in Hugging Face PEFT's files: `adapter_config.json`, `adapter_model.safetensors` and a
//! model card.

mod card;
mod ranks;
mod rebased;
mod settings;
mod stored_type;
mod trained_on;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use tangent_model::family::Model;
use tangent_model::folder::NewFolder;
use tangent_model::{Parameter, Site};
use tangent_ops::FrozenMatrix;

use crate::adapter::{Adapter, Start, attach_all};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::export::{LazyTensor, WriteDtype, zero_length};
use crate::methods::{Attach, PeftType, ia3, norms, virtual_tokens};
use crate::targets::{Targets, ends_with_name, peft_names};

pub use card::{ForOthers, for_others, is_known_to_peft};
pub use settings::{Fields, read_config};
pub use stored_type::note as note_of_stored_type;
pub use trained_on::{TrainedOn, has_own_base, trained_on};

/// Version of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";
/// The settings of an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// Its trained tensors.
pub const TENSORS: &str = "adapter_model.safetensors";
const CARD: &str = "README.md";
/// Folder inside that of an adapter: each adapter that was trained along stands there, in a folder
/// called by its method.
pub const ALSO: &str = "also";
/// Folder inside that of an adapter with a base of its own: what left the weights before they were
/// quantized, as plain LoRA of the original model.
pub const BASE: &str = "base";
/// What precedes names of the model's modules.
const PREFIX: &str = "base_model.model.";
/// What precedes names of tensors that belong to no module.
const SHARED: &str = "base_model.";

/// Types of PEFT without a choice of layers: it warns of the key.
const WITHOUT_LAYERS: &[&str] = &[ia3::TYPE, norms::TYPE];

/// A tensor of an adapter file.
struct Stored {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Attaches the adapter in the folder `dir` to the model that it was trained for, with those inside
/// of it that were trained along. [`trained_on()`] tells of a base that was held in another way than
/// the model's.
///
/// # Errors
/// If the files are malformed, ask for what is not supported, or were made for another base.
pub fn load(model: &mut dyn Model, dir: &Path) -> Result<Adapter, PeftError> {
    load_onto(model, dir, Base::Original)
}

/// Attaches the adapter in the folder `dir` to a model whose weights hold a merged adapter: the
/// frozen weights that PEFT stores with the adapter are those before merging, and stay unused.
///
/// # Errors
/// As [`load`].
pub fn load_onto_merged(model: &mut dyn Model, dir: &Path) -> Result<Adapter, PeftError> {
    load_onto(model, dir, Base::Merged)
}

/// What the weights of the model are to which an adapter is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    /// Those that the adapter was trained for.
    Original,
    /// Those with an adapter merged into them.
    Merged,
}

fn load_onto(model: &mut dyn Model, dir: &Path, base: Base) -> Result<Adapter, PeftError> {
    let path = dir.join(CONFIG);
    if !path.exists() {
        return Err(PeftError::NotAnAdapter {
            path: dir.to_owned(),
            why: match dir.join("config.json").exists() {
                true => "it holds a model: give it as --model, without --adapter",
                false => "expected a folder with adapter_config.json and adapter_model.safetensors",
            },
        });
    }
    let mut folders = vec![dir.to_owned()];
    folders.extend(further(dir)?);
    let configs = folders
        .iter()
        .map(|folder| read_config(&folder.join(CONFIG)));
    let configs = configs.collect::<Result<Vec<AdapterConfig>, PeftError>>()?;
    if base == Base::Original {
        folders
            .iter()
            .try_for_each(|folder| trained_on::check(&*model, folder))?;
    }
    for (config, folder) in configs.iter().zip(&folders) {
        ranks::check(&*model, config, &folder.join(TENSORS))?;
    }
    let mut start = Start {
        from_file: true,
        ..Start::default()
    };
    for (folder, config) in folders.iter().zip(&configs) {
        start
            .taken
            .extend(rebased::read(&*model, folder, config, base)?);
    }
    let misfit = |path: &Path, source: PeftError| match source {
        PeftError::ZeroRow { site, row, .. } if base == Base::Merged => zero_length(&site, row),
        source => unfit(path, source),
    };
    let mut adapter = attach_all(model, &configs, &start).map_err(|source| match source {
        PeftError::Part { method, source } => {
            let mut parts = folders.iter().zip(&configs);
            let of_part = parts.find(|(_, config)| config.method == method);
            misfit(
                &of_part.map_or(path, |(folder, _)| folder.join(CONFIG)),
                *source,
            )
        }
        source => misfit(&path, source),
    })?;
    for (part, folder) in adapter.each().iter().zip(&folders) {
        fill(model, part, &folder.join(TENSORS), base)?;
    }
    trained_on::recall(&mut adapter, &folders)?;
    Ok(adapter)
}

/// The folders of the adapters that were trained along with the one in `dir`, by name.
fn further(dir: &Path) -> Result<Vec<PathBuf>, PeftError> {
    let all = dir.join(ALSO);
    let unreadable = |source| PeftError::Io {
        path: all.clone(),
        source,
    };
    let entries = match std::fs::read_dir(&all) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(unreadable(error)),
    };
    let mut folders = vec![];
    for entry in entries {
        let folder = entry.map_err(unreadable)?.path();
        // One of the files alone is a damaged adapter, which is told of when it is read.
        if [CONFIG, TENSORS]
            .iter()
            .any(|name| folder.join(name).exists())
        {
            folders.push(folder);
        }
    }
    folders.sort();
    Ok(folders)
}

/// Sets the adapter's parameters from a file.
fn fill(
    model: &mut dyn Model,
    adapter: &Adapter,
    path: &Path,
    base: Base,
) -> Result<(), PeftError> {
    let mut tensors = read_tensors(path, peft_type(adapter))?;
    let mut missing = vec![];
    for parameter in &adapter.parameters {
        let Some(stored) = tensors.remove(parameter.name()) else {
            missing.push(parameter.name().to_owned());
            continue;
        };
        check_shape(path, parameter.name(), parameter.shape(), &stored.shape)?;
        parameter.set(stored.values);
    }
    for fixed in &adapter.fixed {
        let name = format!("{SHARED}{}", fixed.name());
        match tensors.remove(&name) {
            Some(stored) => {
                check_shape(path, &name, fixed.shape(), &stored.shape)?;
                fixed.set(stored.values);
            }
            None => missing.push(name),
        }
    }
    refuse(path, "missing", missing)?;
    for site in model.sites_mut() {
        restore_base(site, path, &mut tensors, base)?;
    }
    refuse(path, "unknown", tensors.into_keys().collect())
}

/// PEFT saves the frozen weight of targeted embeddings and heads along with the adapter.
fn restore_base(
    site: &mut Site,
    path: &Path,
    tensors: &mut BTreeMap<String, Stored>,
    base: Base,
) -> Result<(), PeftError> {
    let name = format!("{}.base_layer.weight", site.path);
    let Some(stored) = tensors.remove(&name) else {
        return Ok(());
    };
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    check_shape(path, &name, &[rows, cols], &stored.shape)?;
    if base == Base::Original && site.weight.to_values() != stored.values {
        site.weight = FrozenMatrix::from_values(stored.values, rows, cols);
    }
    Ok(())
}

fn check_shape(
    path: &Path,
    tensor: &str,
    expected: &[usize],
    got: &[usize],
) -> Result<(), PeftError> {
    if expected == got {
        return Ok(());
    }
    Err(PeftError::Shape {
        path: path.to_owned(),
        tensor: tensor.to_owned(),
        expected: expected.to_vec(),
        got: got.to_vec(),
    })
}

fn refuse(path: &Path, what: &'static str, names: Vec<String>) -> Result<(), PeftError> {
    if names.is_empty() {
        return Ok(());
    }
    Err(PeftError::Tensors {
        path: path.to_owned(),
        what,
        count: names.len(),
        first: names.into_iter().take(4).collect(),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, PeftError> {
    std::fs::read(path).map_err(|source| PeftError::Io {
        path: path.to_owned(),
        source,
    })
}

fn unfit(path: &Path, source: PeftError) -> PeftError {
    PeftError::Unfit {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

pub(crate) fn malformed(path: &Path, why: impl ToString) -> PeftError {
    PeftError::Malformed {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

fn read_tensors(path: &Path, kind: &PeftType) -> Result<BTreeMap<String, Stored>, PeftError> {
    let bytes = read(path)?;
    let parsed = SafeTensors::deserialize(&bytes).map_err(|e| malformed(path, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in parsed.iter() {
        if kind.of_modules && !name.starts_with(SHARED) {
            let why = format!("tensor \"{name}\" does not begin with \"{SHARED}\"");
            return Err(malformed(path, why));
        }
        let short = name.strip_prefix(PREFIX).unwrap_or(name);
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Dtype::F16 => pairs(data, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => pairs(data, |b| half::bf16::from_le_bytes(b).to_f32()),
            other => {
                return Err(malformed(
                    path,
                    format!("\"{name}\" is stored as {other:?}"),
                ));
            }
        };
        let stored = Stored {
            shape: view.shape().to_vec(),
            values,
        };
        // Training checkpoints of PEFT keep the adapter's name inside tensor names.
        tensors.insert(short.replace(".default.", "."), stored);
    }
    Ok(tensors)
}

fn pairs(data: &[u8], widen: impl Fn([u8; 2]) -> f32) -> Vec<f32> {
    data.as_chunks::<2>().0.iter().map(|b| widen(*b)).collect()
}

/// `adapter_config.json` of an adapter; of one that is put together, that of its first part.
///
/// # Panics
/// If the method has no such file.
pub fn config_json(adapter: &Adapter, model: &dyn Model, base: &str) -> Value {
    let [adapter, ..] = adapter.each() else {
        unreachable!("an adapter has a part");
    };
    let config = &adapter.config;
    let kind = peft_type(adapter);
    let mut map = (kind.write)(adapter);
    let targets = match &config.targets {
        Targets::Regex(pattern) if config.exclude.is_none() && config.layers.is_none() => {
            json!(pattern)
        }
        _ => json!(peft_names(&adapter.sites, &modules(model))),
    };
    let saved = match &config.modules_to_save {
        names if names.is_empty() => Value::Null,
        names => json!(names),
    };
    let every = [
        (trained_on::RECORD, trained_on::to_json(adapter, model)),
        ("base_model_name_or_path", json!(base)),
        ("inference_mode", json!(true)),
        ("peft_type", json!(kind.name)),
        ("peft_version", json!(PEFT_VERSION)),
        ("revision", Value::Null),
        ("task_type", json!("CAUSAL_LM")),
    ];
    let of_modules = [
        ("layers_to_transform", Value::Null),
        ("modules_to_save", saved),
        ("target_modules", targets),
    ];
    let by_layers = !WITHOUT_LAYERS.contains(&kind.name);
    let of_modules = of_modules
        .into_iter()
        .filter(|(key, _)| kind.of_modules && (by_layers || *key != "layers_to_transform"));
    for (key, value) in every.into_iter().chain(of_modules) {
        map.insert(key.to_owned(), value);
    }
    if matches!(adapter.method.attach, Attach::Prefix(_)) {
        virtual_tokens::of_model(&mut map, model, base);
    }
    if kind.name == ia3::TYPE {
        ia3::within_targets(&mut map, &adapter.sites);
    }
    map.sort_keys();
    Value::Object(map)
}

/// Paths of all modules that an adapter may name.
fn modules(model: &dyn Model) -> Vec<&str> {
    let sites = model.sites().into_iter().map(|site| site.path.as_str());
    let sublayers = model.sublayers().into_iter();
    sites
        .chain(sublayers.map(|sublayer| sublayer.path.as_str()))
        .collect()
}

fn peft_type(adapter: &Adapter) -> &'static PeftType {
    match &adapter.method.peft {
        Some(kind) => kind,
        None => unreachable!("{} makes models, not adapters", adapter.method.id),
    }
}

/// The keys of a JSON object.
///
/// # Panics
/// If it is none.
pub(crate) fn object(json: Value) -> Map<String, Value> {
    match json {
        Value::Object(map) => map,
        other => unreachable!("an object, not {other}"),
    }
}

/// Values by pattern, in their order.
pub(crate) fn pattern<T: Copy>(pairs: &[(String, T)], value: impl Fn(T) -> Value) -> Value {
    let pairs = pairs.iter();
    pairs.map(|(k, v)| (k.clone(), value(*v))).collect()
}

/// Whole numbers without a fraction, as PEFT writes them.
pub(crate) fn number(value: f32) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e9 && value != 0.0 {
        json!(value as i64)
    } else {
        // The shortest decimal of the f32, not the f64's long one.
        value
            .to_string()
            .parse::<f64>()
            .map_or(json!(value), |v| json!(v))
    }
}

/// Writes the adapter's files into a folder in the making: those of its first part, and of each
/// further one in a folder inside (see [`ALSO`]).
///
/// # Errors
/// If the system refuses.
pub fn write(
    folder: &NewFolder,
    adapter: &Adapter,
    model: &dyn Model,
    base: &str,
) -> Result<(), PeftError> {
    let parts = adapter.each();
    let held = card::held(model);
    for (index, part) in parts.iter().enumerate() {
        let within = match index {
            0 => String::new(),
            _ => format!("{ALSO}/{}/", part.method.id),
        };
        folder.create_folder(&within)?;
        write_part(folder, &within, part, model, base)?;
        rebased::write(folder, &within, part, model, base)?;
        let card = card::card(parts, index, (base, held));
        folder.write(&format!("{within}{CARD}"), card.as_bytes())?;
    }
    Ok(())
}

/// Writes tensors and configuration of an adapter that stands alone.
fn write_part(
    folder: &NewFolder,
    within: &str,
    adapter: &Adapter,
    model: &dyn Model,
    base: &str,
) -> Result<(), PeftError> {
    let sites = model.sites();
    let kind = peft_type(adapter);
    let own = (kind.tensors)(adapter).into_iter();
    let own = own.map(|(name, tensor)| match kind.of_modules {
        true => (format!("{PREFIX}{name}"), tensor),
        false => (name, tensor),
    });
    let fixed = adapter.fixed.iter().map(|fixed| {
        let name = format!("{SHARED}{}", fixed.name());
        (name, stored(fixed))
    });
    let mut outputs: BTreeMap<String, LazyTensor<'_>> = own.chain(fixed).collect();
    for site in &sites {
        let whole = matches!(
            site.kind,
            tangent_model::SiteKind::Embedding | tangent_model::SiteKind::Head
        );
        let targeted = adapter.sites.iter().any(|p| ends_with_name(p, &site.path));
        let in_place = matches!(adapter.method.attach, Attach::Select(_));
        if whole && targeted && !in_place {
            let shape = vec![site.weight.rows(), site.weight.cols()];
            let stored = LazyTensor::new(shape, WriteDtype::F32, || site.weight.to_values());
            outputs.insert(format!("{PREFIX}{}.base_layer.weight", site.path), stored);
        }
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    folder.write_tensors(
        &format!("{within}{TENSORS}"),
        outputs.iter(),
        Some(metadata),
    )?;
    let json = config_json(adapter, model, base);
    folder.write(&format!("{within}{CONFIG}"), format!("{json:#}").as_bytes())?;
    Ok(())
}

/// A tensor of an adapter as it is.
pub(crate) fn stored(parameter: &Parameter) -> LazyTensor<'_> {
    let shape = parameter.shape().to_vec();
    LazyTensor::new(shape, WriteDtype::F32, || parameter.values())
}

/// Every trained tensor as it is, by name.
pub(crate) fn tensors(adapter: &Adapter) -> Vec<(String, LazyTensor<'_>)> {
    let parameters = adapter.parameters.iter();
    parameters
        .map(|p| (p.name().to_owned(), stored(p)))
        .collect()
}
