//! Start values of the blocks cut out of the model's own layers, where the loss depends on them
//! most.
//!
//! ```text
//! columns = the d_s features of largest F of the embedding
//! for every layer:
//!     q, k, v   rows of the largest sum over columns of F_q F_k F_v        input: columns
//!     o         rows of the largest sum over those of F_o                  -> columns
//!     gate, up  rows of the largest sum over columns of F_gate F_up        input: columns
//!     down      rows of the largest sum over those of F_down               -> columns
//! norms keep the values of the columns that they scale
//!
//! F: importance of each value, see `importances.rs`
//! ```
//!
//! These are the authors' `fisher-v2`, which also takes what one map keeps for what the next one
//! reads, skip connections notwithstanding. Differences: their heads have no rotation, so that a
//! kept row may change its head and place. Here every head keeps, of each band of its rotary
//! frequencies, the pair of rows of the largest sum, the same in all query heads of a key head,
//! whose F_q are added up. The embedding counts as it is read by the first layer, not as a tied
//! head. Biases are left out. Layers without a block pass their columns on.

use std::collections::BTreeMap;

use tangent_model::family::Model;
use tangent_ops::AttentionShape;

use super::layout::{Layout, bands, site};
use super::{FISHER_ROWS, START, of_layer};
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::importances::Importances;

/// The start that cuts blocks out of the model's layers.
pub(super) const FISHER: &str = "fisher";

/// Rows of training data that the start values look at; refused is their number where they look at
/// none.
pub(super) fn rows(config: &AdapterConfig) -> Result<Option<usize>, PeftError> {
    let start = config.own(START);
    match start.word() {
        "random" => match config.own.get(FISHER_ROWS) {
            None => Ok(None),
            Some(rows) => Err(PeftError::Setting {
                setting: FISHER_ROWS,
                value: rows.to_string(),
                why: "is read with start=fisher alone; add that, or leave it out",
            }),
        },
        FISHER => {
            let why = "must be a whole number of at least 1";
            config.whole(FISHER_ROWS, 1, why).map(Some)
        }
        other => Err(PeftError::Setting {
            setting: START,
            value: other.to_owned(),
            why: "must be random or fisher",
        }),
    }
}

/// Start values of the blocks, by name.
pub(super) fn values(
    config: &AdapterConfig,
    model: &dyn Model,
    importances: &Importances,
) -> Result<BTreeMap<String, Vec<f32>>, PeftError> {
    let layout = Layout::of(config, model)?;
    let embedding = importances.embedding.iter().map(|f| f64::from(*f));
    let mut columns = largest(embedding, layout.width);
    let mut found = BTreeMap::new();
    for index in 0..model.layers() {
        let mut pruned = Pruned {
            layer: Layer {
                model,
                index,
                importances,
            },
            values: vec![],
        };
        columns = pruned.attention(columns, &layout)?;
        columns = pruned.feed_forward(columns, &layout)?;
        if layout.layers.contains(&index) {
            let named = pruned.values.into_iter();
            found.extend(named.map(|(name, values)| (of_layer(index, &name), values)));
        }
    }
    Ok(found)
}

/// A layer and the importances of its values.
#[derive(Clone, Copy)]
struct Layer<'m> {
    model: &'m dyn Model,
    index: usize,
    importances: &'m Importances,
}

/// What is kept of a layer, by name.
struct Pruned<'m> {
    layer: Layer<'m>,
    values: Vec<(String, Vec<f32>)>,
}

/// A weight or its importances, row-major.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    values: &'a [f32],
    cols: usize,
}

impl Matrix<'_> {
    fn at(&self, row: usize, col: usize) -> f64 {
        let value = self.values.get(row * self.cols + col);
        value.map_or(0.0, |v| f64::from(*v))
    }

    /// Sum of a row over some columns.
    fn row_sum(&self, row: usize, columns: &[usize]) -> f64 {
        columns.iter().map(|&col| self.at(row, col)).sum()
    }
}

impl<'m> Layer<'m> {
    /// The importances of the linear map `name`.
    fn importance(&self, name: &str) -> Result<Matrix<'m>, PeftError> {
        let site = site(self.model, self.index, name)?;
        let found = self.importances.weights.get(&site.path);
        let values = found.ok_or_else(|| PeftError::NoEvidence {
            site: site.path.clone(),
            init: FISHER,
            needs: "gradients",
        })?;
        Ok(Matrix {
            values,
            cols: site.weight.cols(),
        })
    }

    /// The rows of each key head that are kept, in order: the first halves of its pairs, then the
    /// second ones.
    fn kept_features(
        &self,
        columns: &[usize],
        attention: AttentionShape,
        narrow: usize,
    ) -> Result<Vec<Vec<usize>>, PeftError> {
        let (q, k, v) = (
            self.importance("q_proj")?,
            self.importance("k_proj")?,
            self.importance("v_proj")?,
        );
        let (d, half) = (attention.head_dim, attention.head_dim / 2);
        let group = attention.heads / attention.kv_heads;
        let score = |g: usize, feature: usize| -> f64 {
            let row = g * d + feature;
            let of_column = |&col: &usize| {
                let heads = g * group..(g + 1) * group;
                let q: f64 = heads.map(|head| q.at(head * d + feature, col)).sum();
                q * k.at(row, col) * v.at(row, col)
            };
            columns.iter().map(of_column).sum()
        };
        let kept_of_head = |g: usize| -> Vec<usize> {
            let pair = |j: &usize| score(g, *j) + score(g, j + half);
            let kept = bands(half, narrow / 2).filter_map(|mut band| {
                let first = band.next()?;
                // The first one of equals.
                Some(band.fold((first, pair(&first)), |best, j| match pair(&j) {
                    more if more > best.1 => (j, more),
                    _ => best,
                }))
            });
            let low: Vec<usize> = kept.map(|(j, _)| j).collect();
            low.iter()
                .copied()
                .chain(low.iter().map(|j| j + half))
                .collect()
        };
        Ok((0..attention.kv_heads).map(kept_of_head).collect())
    }
}

impl Pruned<'_> {
    /// Keeps the attention that reads `columns`; gives the columns that it writes.
    fn attention(&mut self, columns: Vec<usize>, layout: &Layout) -> Result<Vec<usize>, PeftError> {
        let shape = AttentionShape {
            head_dim: self.layer.model.attention_shape().head_dim,
            ..layout.attention
        };
        let features = self
            .layer
            .kept_features(&columns, shape, layout.attention.head_dim)?;
        let group = shape.heads / shape.kv_heads;
        let rows = |heads: usize, group: usize| -> Vec<usize> {
            let of_head = |head: usize| {
                let features = features.get(head / group).into_iter().flatten();
                features.map(move |feature| head * shape.head_dim + feature)
            };
            (0..heads).flat_map(of_head).collect()
        };
        let (queries, keys) = (rows(shape.heads, group), rows(shape.kv_heads, 1));
        self.keep_norm("input_layernorm", &columns)?;
        self.keep("self_attn.q_proj", &queries, &columns)?;
        self.keep("self_attn.k_proj", &keys, &columns)?;
        self.keep("self_attn.v_proj", &keys, &columns)?;
        let written = self.largest_rows("o_proj", layout.outer, &queries, layout.width)?;
        self.keep("self_attn.o_proj", &written, &queries)?;
        Ok(written)
    }

    /// Keeps the feed-forward that reads `columns`; gives the columns that it writes.
    fn feed_forward(
        &mut self,
        columns: Vec<usize>,
        layout: &Layout,
    ) -> Result<Vec<usize>, PeftError> {
        let (gate, up) = (
            self.layer.importance("gate_proj")?,
            self.layer.importance("up_proj")?,
        );
        let inner = gate.values.len() / gate.cols.max(1);
        let score = |row: usize| -> f64 {
            let both = columns
                .iter()
                .map(|&col| gate.at(row, col) * up.at(row, col));
            both.sum()
        };
        let inner = largest((0..inner).map(score), layout.inner);
        self.keep_norm("post_attention_layernorm", &columns)?;
        self.keep("mlp.gate_proj", &inner, &columns)?;
        self.keep("mlp.up_proj", &inner, &columns)?;
        let written = self.largest_rows("down_proj", layout.outer, &inner, layout.width)?;
        self.keep("mlp.down_proj", &written, &inner)?;
        Ok(written)
    }

    /// The rows of the map `name` that are most important for what it does with `columns`.
    fn largest_rows(
        &self,
        name: &str,
        rows: usize,
        columns: &[usize],
        count: usize,
    ) -> Result<Vec<usize>, PeftError> {
        let importance = self.layer.importance(name)?;
        let scores = (0..rows).map(|row| importance.row_sum(row, columns));
        Ok(largest(scores, count))
    }

    /// Keeps rows and columns of a linear map.
    fn keep(&mut self, name: &str, rows: &[usize], columns: &[usize]) -> Result<(), PeftError> {
        let site = site(self.layer.model, self.layer.index, name)?;
        let values = site.weight.to_values();
        let weight = Matrix {
            values: &values,
            cols: site.weight.cols(),
        };
        let row = |&row: &usize| columns.iter().map(move |&col| weight.at(row, col) as f32);
        let kept = rows.iter().flat_map(row).collect();
        self.values.push((format!("{name}.weight"), kept));
        Ok(())
    }

    /// Keeps values of a normalization.
    fn keep_norm(&mut self, name: &str, columns: &[usize]) -> Result<(), PeftError> {
        self.keep(name, &[0], columns)
    }
}

/// Places of the `count` largest scores, ascending; the first ones of equals.
fn largest(scores: impl Iterator<Item = f64>, count: usize) -> Vec<usize> {
    let mut places: Vec<(usize, f64)> = scores.enumerate().collect();
    // A stable sort keeps equals in their order.
    places.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut kept: Vec<usize> = places.into_iter().take(count).map(|(at, _)| at).collect();
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_testkit::{folder, model};

    use super::*;
    use crate::setting::SettingValue;

    const HEAD: usize = 16;

    fn config() -> AdapterConfig {
        AdapterConfig {
            method: "lst".into(),
            own: [
                ("reduction_factor".to_owned(), SettingValue::Number(4.0)),
                ("start".to_owned(), SettingValue::text("fisher")),
            ]
            .into(),
            ..AdapterConfig::default()
        }
    }

    /// Importances of 1 but for rows, by the end of a site's path, and columns of the embedding.
    fn importances(model: &dyn Model, rows: &[(&str, &[usize])], columns: &[usize]) -> Importances {
        let linear = |kind| kind == SiteKind::Linear;
        let sites = model.sites().into_iter().filter(|site| linear(site.kind));
        let weights = sites.map(|site| {
            let (d_out, d_in) = (site.weight.rows(), site.weight.cols());
            let mut values = vec![1.0; d_out * d_in];
            for (_, rows) in rows.iter().filter(|(name, _)| site.path.ends_with(name)) {
                for &row in *rows {
                    values[row * d_in..][..d_in].fill(9.0);
                }
            }
            (site.path.clone(), values)
        });
        let mut embedding = vec![1.0; model.head().weight.cols()];
        for &column in columns {
            embedding[column] = 9.0;
        }
        Importances {
            weights: weights.collect(),
            embedding,
        }
    }

    #[test]
    fn blocks_are_the_most_important_parts_of_layers() {
        // Four query heads and two key heads of 16 features on a stream of 32.
        let base = model(&folder("llama/everything"));
        let (first, second) = ("layers.0.self_attn", "layers.0.mlp");
        let (q, k) = (format!("{first}.q_proj"), format!("{first}.k_proj"));
        let (o, up) = (format!("{first}.o_proj"), format!("{second}.up_proj"));
        // Of the first key head pair 3, by one of its two query heads; of the second pair 6.
        let importances = importances(
            &*base,
            &[
                (q.as_str(), &[HEAD + 3]),
                (k.as_str(), &[HEAD + 6 + 8]),
                (o.as_str(), &[2, 30]),
                (up.as_str(), &[7, 40]),
            ],
            &[31, 5],
        );
        let found = values(&config(), &*base, &importances).unwrap();
        let columns = [0, 1, 2, 3, 4, 5, 6, 31];
        let written = [0, 1, 2, 3, 4, 5, 6, 30];
        let of = |name: &str, rows: &[usize], columns: &[usize]| -> Vec<f32> {
            let site = site(&*base, 0, name).unwrap();
            let (values, cols) = (site.weight.to_values(), site.weight.cols());
            let row = |&row: &usize| columns.iter().map(move |col| row * cols + col);
            rows.iter().flat_map(row).map(|at| values[at]).collect()
        };
        // Heads of four features: pairs 0 and 4 start the two bands of eight pairs.
        let head = |head: usize, pairs: [usize; 2]| {
            let [a, b] = pairs;
            [a, b, a + 8, b + 8].map(|feature| head * HEAD + feature)
        };
        let (one, two) = ([3, 4], [0, 6]);
        let queries = [head(0, one), head(1, one), head(2, two), head(3, two)].concat();
        let keys = [head(0, one), head(1, two)].concat();
        let inner = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 40];
        let cases: [(&str, &[usize], &[usize]); 8] = [
            ("input_layernorm", &[0], &columns),
            ("self_attn.q_proj", &queries, &columns),
            ("self_attn.k_proj", &keys, &columns),
            ("self_attn.v_proj", &keys, &columns),
            ("self_attn.o_proj", &written, &queries),
            ("post_attention_layernorm", &[0], &written),
            ("mlp.gate_proj", &inner, &written),
            ("mlp.down_proj", &[0, 1, 2, 3, 4, 5, 6, 7], &inner),
        ];
        for (name, rows, columns) in cases {
            let got = &found[&format!("side.layers.0.{name}.weight")];
            assert_eq!(got, &of(name, rows, columns), "{name}");
        }
        // Every start value is that of a tensor of the network.
        let mut again = model(&folder("llama/everything"));
        let start = crate::Start {
            values: found.clone(),
            ..crate::Start::default()
        };
        let adapter = crate::attach_from(&mut *again, &config(), &start).unwrap();
        for (name, values) in &found {
            let parameter = adapter.parameters.iter().find(|p| p.name() == name);
            assert_eq!(&parameter.unwrap().values(), values, "{name}");
        }
        assert_eq!(found.len(), 2 * 9);
    }

    #[test]
    fn the_first_of_equals_are_kept_in_order() {
        let kept = |scores: &[f64], count| largest(scores.iter().copied(), count);
        assert_eq!(kept(&[1.0, 5.0, 1.0, 5.0, 2.0], 3), [1, 3, 4]);
        assert_eq!(kept(&[2.0, 2.0, 2.0], 2), [0, 1]);
        // A damaged model is told of by its loss.
        assert_eq!(kept(&[1.0, f64::NAN, 3.0, f64::INFINITY], 3), [1, 2, 3]);
    }

    #[test]
    fn rows_are_refused_where_nothing_looks_at_them() {
        let of = |start: Option<&'static str>, rows: Option<f64>| {
            let mut config = config();
            config.own.remove("start");
            let given = start.map(|word| ("start", SettingValue::text(word)));
            let counted = rows.map(|rows| ("fisher_rows", SettingValue::Number(rows)));
            for (name, value) in given.into_iter().chain(counted) {
                config.own.insert(name.to_owned(), value);
            }
            super::rows(&config)
        };
        assert_eq!(of(None, None).unwrap(), None);
        assert_eq!(of(Some("fisher"), Some(3.0)).unwrap(), Some(3));
        assert_eq!(of(Some("fisher"), None).unwrap(), Some(1024));
        for (start, rows) in [
            (None, 3.0),
            (Some("random"), 1024.0),
            (Some("random"), -3.0),
            (Some("fisher"), -3.0),
        ] {
            let error = of(start, Some(rows)).unwrap_err().to_string();
            let words = format!("fisher_rows = {rows}");
            assert!(error.contains(&words), "{start:?}: {error}");
        }
    }

    #[test]
    fn without_importances_the_start_is_refused() {
        let mut model = model(&folder("llama/everything"));
        let error = crate::attach(&mut *model, &config(), 0).err().unwrap();
        assert!(error.to_string().contains("fisher"), "{error}");
        let error = values(&config(), &*model, &Importances::default());
        assert!(error.unwrap_err().to_string().contains("gradients"));
    }
}
