//! `report.html`: what `metrics.jsonl` holds, as curves, heat maps and a sentence.

mod sentence;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tangent_model::folder;

use crate::error::TrainError;
use crate::meter::ranks;
use crate::metrics::METRICS;
use crate::report::{Arrangement, Axis, HeatMap, HeatPanel, LineChart, Page, Series};
use crate::twin;

use sentence::{ranks_can_move, sentence};

/// Name of the report in a run's output folder.
pub const REPORT: &str = "report.html";

/// Most readings of the meter that are drawn site by site.
const PANELS: usize = 6;

/// Most readings that are drawn layer by layer, in columns.
const COLUMNS: usize = 100;

/// Settings that are too long for a table.
const LONG: [&str; 3] = ["target_modules", "data", "eval_data"];

/// Writes the report of the run in `output`, from its `metrics.jsonl` and `run.json`.
///
/// # Errors
/// If there is no `metrics.jsonl` or the report cannot be written.
pub fn write(output: &Path) -> Result<(), TrainError> {
    let path = output.join(METRICS);
    let text = fs::read_to_string(&path).map_err(|source| TrainError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let lines: Vec<Value> = text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    // Runs of libraries may have other settings, or none.
    let settings = fs::read(output.join("run.json")).unwrap_or_default();
    let settings: Value = serde_json::from_slice(&settings).unwrap_or_default();
    let shares = ranks::lost_shares(&path).unwrap_or_default();
    let sentence = sentence(&shares, ranks_can_move(&settings));
    // That of another run may have been left.
    let twin = twin::Record::read(output).ok().flatten();
    let twin = twin.filter(|twin| twin.settings == settings);
    let html = page(&lines, &settings, sentence.as_deref(), twin.as_ref());
    folder::write_file(&output.join(REPORT), html.as_bytes())?;
    Ok(())
}

fn page(
    lines: &[Value],
    settings: &Value,
    sentence: Option<&str>,
    twin: Option<&twin::Record>,
) -> String {
    let word = |key: &str| settings.get(key).and_then(Value::as_str);
    let also = settings.get("also").and_then(Value::as_array);
    let also = also
        .into_iter()
        .flatten()
        .filter_map(|further| further["method"].as_str());
    let also: String = also.map(|method| format!(" + {method}")).collect();
    let mut page = match (word("method"), word("model")) {
        (Some(method), Some(model)) => Page::new(format!("{method}{also} on {model}")),
        _ => Page::new("Training run"),
    };
    let losses = vec![
        series("training", lines, "loss"),
        series("held out", lines, "eval_loss"),
    ];
    let loss = chart("Loss", Axis::linear("Loss", "nats per token"), losses);
    page.figure(
        "Mean negative log-likelihood of supervised tokens since the entry before, and of held-out \
         rows.",
        &loss,
    );
    meter(&mut page, lines, sentence);
    twin::section(&mut page, lines, twin);
    let rates = vec![series("learning rate", lines, "learning_rate")];
    let rate = chart("Learning rate", Axis::linear("Learning rate", ""), rates);
    page.figure("Learning rate of the last step before the entry.", &rate);
    let speeds = vec![series("speed", lines, "tokens_per_second")];
    let speed = chart("Speed", Axis::linear("Speed", "tokens/s"), speeds);
    page.figure("Tokens a second of training steps.", &speed);
    if let Some(settings) = settings.as_object() {
        let short = settings
            .iter()
            .filter(|(key, _)| !LONG.contains(&key.as_str()));
        let rows: Vec<Vec<String>> = short
            .map(|(key, value)| vec![key.clone(), plain(value)])
            .collect();
        page.heading("Settings").table(&["Setting", "Value"], &rows);
    }
    page.finish()
}

/// The part on how close the steps were to full fine-tuning, if that was measured at some site.
fn meter(page: &mut Page, lines: &[Value], sentence: Option<&str>) {
    let has_sites = |line: &&Value| {
        let sites = line.get("meter").and_then(Value::as_object);
        sites.is_some_and(|sites| !sites.is_empty())
    };
    let readings: Vec<&Value> = lines.iter().filter(has_sites).collect();
    if readings.is_empty() {
        return;
    }
    page.heading("How close to full fine-tuning");
    if let Some(sentence) = sentence {
        page.paragraph(sentence);
    }
    let means = vec![
        series("captured share", lines, "kappa"),
        series("cosine", lines, "cosine"),
    ];
    let means = chart("Closeness of steps", Axis::linear("Closeness", ""), means);
    page.figure(
        "Captured share: how much of the full gradient the adapter can follow, its squared \
         projection onto the directions in which the adapter can move the weights. Cosine: between \
         the change that the step made and the negative full gradient, which is the step of plain \
         gradient descent: one of AdamW has less than 1, even of full fine-tuning. Means over the \
         sites, weighted by the squares of their gradients' norms.",
        &means,
    );
    if readings.len() > 1 {
        let caption = format!(
            "Captured share of every layer at {}: means over its sites, weighted alike.",
            told(readings.len(), COLUMNS)
        );
        page.figure(&caption, &layer_map(&readings).svg());
    }
    let caption = format!(
        "Captured share of every site at {}. Dark sites lose most of their gradient.",
        told(readings.len(), PANELS)
    );
    page.figure(&caption, &heat_map(&readings).svg());
}

/// How many of the readings are drawn, in words.
fn told(readings: usize, most: usize) -> String {
    match readings > most {
        true => format!("{most} of {readings} readings"),
        false => "all readings".to_owned(),
    }
}

/// Places of at most `most` out of so many readings, evenly chosen with the first and the last.
fn evenly(readings: usize, most: usize) -> impl Iterator<Item = usize> {
    let (last, chosen) = (readings.saturating_sub(1), most.min(readings));
    (0..chosen).map(move |i| i * last / (chosen - 1).max(1))
}

fn chart(title: &str, y: Axis, series: Vec<Series>) -> String {
    let series = series.into_iter().filter(|s| !s.points.is_empty());
    let chart = LineChart {
        title: title.to_owned(),
        x: Axis::linear("Step", ""),
        y,
        series: series.collect(),
    };
    chart.svg()
}

/// Values of `key` by step.
fn series(name: &str, lines: &[Value], key: &str) -> Series {
    let point = |line: &Value| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?));
    Series {
        name: name.to_owned(),
        points: lines.iter().filter_map(point).collect(),
        band: vec![],
    }
}

/// A value as it would be typed.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The last part of a site's path, and the first number in it.
fn kind_and_layer(site: &str) -> (&str, Option<usize>) {
    let kind = site.rsplit('.').next().unwrap_or(site);
    (kind, site.split('.').find_map(|part| part.parse().ok()))
}

/// Kinds of sites and layers of all readings, kinds in the order of the first one.
fn places<'a>(sites: impl Iterator<Item = &'a String>) -> (Vec<&'a str>, Vec<Option<usize>>) {
    let mut kinds: Vec<&str> = vec![];
    let mut layers = BTreeSet::new();
    for site in sites {
        let (kind, layer) = kind_and_layer(site);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
        // Sites of no layer come last.
        layers.insert((layer.is_none(), layer));
    }
    (kinds, layers.into_iter().map(|(_, layer)| layer).collect())
}

fn step(reading: &Value) -> u64 {
    reading.get("step").and_then(Value::as_u64).unwrap_or(0)
}

/// The captured share of a layer's sites together, or of those of no layer.
fn of_layer(reading: &Value, layer: Option<usize>) -> Option<f64> {
    let sites = reading.get("meter")?.as_object()?;
    let own = sites
        .iter()
        .filter(|(site, _)| kind_and_layer(site).1 == layer);
    let (mut captured, mut all) = (0.0, 0.0);
    for (_, found) in own {
        let number = |key: &str| found.get(key).and_then(Value::as_f64);
        if let (Some(kappa), Some(norm)) = (number("kappa"), number("gradient_norm")) {
            captured += kappa * norm * norm;
            all += norm * norm;
        }
    }
    (all > 0.0).then(|| captured / all)
}

/// The captured shares, layer by reading.
fn layer_map(readings: &[&Value]) -> HeatMap {
    let chosen = evenly(readings.len(), COLUMNS).filter_map(|i| readings.get(i).copied());
    let chosen: Vec<&Value> = chosen.collect();
    let sites = chosen.iter().filter_map(|r| r.get("meter")?.as_object());
    let (_, layers) = places(sites.flat_map(|sites| sites.keys()));
    let row = |layer: &Option<usize>| -> Vec<Option<f64>> {
        let values = chosen.iter().map(|reading| of_layer(reading, *layer));
        values.collect()
    };
    let name = |layer: &Option<usize>| match layer {
        Some(layer) => format!("Layer {layer}"),
        None => "no layer".to_owned(),
    };
    HeatMap {
        title: "Captured share of the gradient by layer".to_owned(),
        rows: layers.iter().map(name).collect(),
        columns: chosen.iter().map(|r| step(r).to_string()).collect(),
        column_title: "Step".to_owned(),
        value_title: "Captured share".to_owned(),
        range: Some((0.0, 1.0)),
        panels: vec![HeatPanel {
            title: String::new(),
            values: layers.iter().map(row).collect(),
            titles: vec![],
        }],
        arrangement: Arrangement::SideBySide,
    }
}

/// The captured shares, kind by layer, at evenly chosen readings with the first and the last.
fn heat_map(readings: &[&Value]) -> HeatMap {
    let sites = readings.iter().filter_map(|r| r.get("meter")?.as_object());
    let (kinds, layers) = places(sites.flat_map(|sites| sites.keys()));
    let panel = |reading: &&Value| {
        let mut values = vec![vec![None; layers.len()]; kinds.len()];
        let sites = reading.get("meter").and_then(Value::as_object);
        for (site, found) in sites.into_iter().flatten() {
            let (kind, layer) = kind_and_layer(site);
            let row = kinds.iter().position(|k| *k == kind);
            let column = layers.iter().position(|l| *l == layer);
            let cell = row.and_then(|row| values.get_mut(row)?.get_mut(column?));
            if let Some(cell) = cell {
                *cell = found.get("kappa").and_then(Value::as_f64);
            }
        }
        HeatPanel {
            title: format!("Step {}", step(reading)),
            values,
            titles: vec![],
        }
    };
    let chosen = evenly(readings.len(), PANELS);
    HeatMap {
        title: "Captured share of the gradient".to_owned(),
        rows: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
        columns: layers
            .iter()
            .map(|layer| layer.map_or("none".to_owned(), |l| l.to_string()))
            .collect(),
        column_title: "Layer".to_owned(),
        value_title: "Captured share".to_owned(),
        range: Some((0.0, 1.0)),
        panels: chosen.filter_map(|i| readings.get(i)).map(panel).collect(),
        arrangement: Arrangement::SideBySide,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn layers_have_a_cell_for_every_reading() {
        let reading = |step: usize| {
            json!({"step": step, "meter": {
                "model.layers.0.q_proj": {"kappa": 0.5, "gradient_norm": 1.0},
                "model.layers.0.v_proj": {"kappa": 0.25, "gradient_norm": 3.0},
                "model.layers.1.q_proj": {"kappa": 0.75},
                "lm_head": {"kappa": 1.0, "gradient_norm": 2.0},
            }})
        };
        let readings: Vec<Value> = (1..=COLUMNS + 20).map(reading).collect();
        let readings: Vec<&Value> = readings.iter().collect();
        let map = layer_map(&readings[..7]);
        assert_eq!(map.rows, ["Layer 0", "Layer 1", "no layer"]);
        assert_eq!(map.columns, ["1", "2", "3", "4", "5", "6", "7"]);
        let values = &map.panels[0].values;
        assert_eq!(values[0], [Some((0.5 + 9.0 * 0.25) / 10.0); 7]);
        assert_eq!((values[1][0], values[2][6]), (None, Some(1.0)));
        let many = layer_map(&readings);
        assert_eq!(many.columns.len(), COLUMNS);
        assert_eq!(many.columns.last().unwrap(), "120");
        assert_eq!(told(120, COLUMNS), "100 of 120 readings");
        assert_eq!(told(7, COLUMNS), "all readings");
    }

    #[test]
    fn heat_maps_have_a_cell_for_every_site() {
        let reading = |step: usize| {
            json!({"step": step, "meter": {
                "model.layers.0.self_attn.q_proj": {"kappa": 0.25},
                "model.layers.1.self_attn.q_proj": {"kappa": 0.5},
                "model.layers.1.mlp.down_proj": {"kappa": 0.75},
                "lm_head": {"kappa": 1.0},
            }})
        };
        let readings: Vec<Value> = (1..=20).map(reading).collect();
        let map = heat_map(&readings.iter().collect::<Vec<_>>());
        assert_eq!(map.rows, ["q_proj", "down_proj", "lm_head"]);
        assert_eq!(map.columns, ["0", "1", "none"]);
        let titles: Vec<&str> = map.panels.iter().map(|p| p.title.as_str()).collect();
        let want = [
            "Step 1", "Step 4", "Step 8", "Step 12", "Step 16", "Step 20",
        ];
        assert_eq!(titles, want);
        assert_eq!(map.panels[0].values[0], [Some(0.25), Some(0.5), None]);
        assert_eq!(map.panels[5].values[1], [None, Some(0.75), None]);
        assert_eq!(map.panels[5].values[2], [None, None, Some(1.0)]);
        let one = heat_map(&[&readings[2]]);
        assert_eq!(one.panels.len(), 1);
    }

    #[test]
    fn a_report_shows_what_was_logged() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write(dir.path()).is_err(), "nothing was logged");
        let lines = [
            json!({"step": 0, "eval_loss": 3.0}),
            json!({"step": 10, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 900.0}),
        ];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(dir.path().join(METRICS), &text).unwrap();
        write(dir.path()).unwrap();
        let read = || fs::read_to_string(dir.path().join(REPORT)).unwrap();
        assert!(read().contains("Training run") && !read().contains("full fine-tuning"));
        // Where every gradient was zero, readings have no site.
        let empty = json!({"step": 10, "kappa": null, "cosine": null, "meter": {}});
        fs::write(dir.path().join(METRICS), format!("{text}{empty}\n")).unwrap();
        write(dir.path()).unwrap();
        assert!(!read().contains("full fine-tuning") && read().contains("Learning rate"));
        let settings = json!({"method": "lora", "model": "m", "rank": 8, "data": {"rows": 2}});
        fs::write(dir.path().join("run.json"), settings.to_string()).unwrap();
        let reading = json!({"step": 10, "kappa": 0.5, "cosine": 0.1, "meter": {
            "model.layers.0.self_attn.q_proj": {"kappa": 0.5, "gradient_norm": 1.0},
        }});
        let text = format!("{text}{empty}\n{reading}\n");
        fs::write(dir.path().join(METRICS), text).unwrap();
        write(dir.path()).unwrap();
        let html = read();
        for part in [
            "lora on m",
            "How close to full",
            "loses 50 %",
            "Step 10",
            "rank",
        ] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("rows&quot;"), "long settings are left out");
    }
}
