//! Which sites an adapter attaches to: names, globs, presets, regular expressions.

use tangent_model::{Site, SiteKind, Sublayer};

use crate::error::PeftError;

/// What an adapter may attach to, as patterns see it.
pub trait Place {
    /// Path of the module.
    fn path(&self) -> &str;
    /// The layer that it belongs to.
    fn layer(&self) -> Option<usize>;
    /// Whether the presets may choose it.
    fn in_presets(&self) -> bool;
    /// What there is to say of a target that matches nothing of this kind; `near` are names like it.
    fn unknown(target: String, near: String) -> PeftError
    where
        Self: Sized;
}

impl Place for Site {
    fn path(&self) -> &str {
        &self.path
    }

    fn layer(&self) -> Option<usize> {
        self.layer
    }

    fn in_presets(&self) -> bool {
        self.kind == SiteKind::Linear
    }

    fn unknown(target: String, near: String) -> PeftError {
        PeftError::UnknownTarget { target, near }
    }
}

impl Place for Sublayer {
    fn path(&self) -> &str {
        &self.path
    }

    fn layer(&self) -> Option<usize> {
        Some(self.layer)
    }

    fn in_presets(&self) -> bool {
        true
    }

    fn unknown(target: String, near: String) -> PeftError {
        PeftError::UnknownSublayer { target, near }
    }
}

/// A choice of sites or sub-layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Module names (a site matches if its path is the name or ends with `.name`), globs over
    /// whole paths, and the presets `attention`, `mlp` and `all-linear`.
    List(Vec<String>),
    /// Module names as a PEFT file lists them: no globs and no presets; names that match nothing
    /// are ignored.
    Names(Vec<String>),
    /// A regular expression that the whole path must match.
    Regex(String),
}

impl Default for Targets {
    /// Every linear map inside of layers.
    fn default() -> Self {
        Self::parse(&["all-linear".to_owned()])
    }
}

impl Targets {
    /// A choice from names as they are typed.
    pub fn parse(names: &[String]) -> Self {
        Self::List(names.to_vec())
    }

    /// The chosen ones of `sites`, in their order; perhaps none, unless names were typed.
    ///
    /// # Errors
    /// If a typed name matches nothing or a pattern does not parse.
    pub fn select<'a, P: Place>(&self, sites: &[&'a P]) -> Result<Vec<&'a P>, PeftError> {
        let matchers = match self {
            Self::List(names) => names
                .iter()
                .map(|n| Matcher::parse(n))
                .collect::<Result<_, _>>()?,
            Self::Names(names) => names.iter().cloned().map(Matcher::Name).collect(),
            Self::Regex(pattern) => vec![Matcher::regex(pattern)?],
        };
        let typed = matches!(self, Self::List(_));
        for matcher in &matchers {
            if typed && !sites.iter().any(|site| matcher.matches(*site)) {
                let target = matcher.text();
                return Err(P::unknown(target.to_owned(), near(target, sites)));
            }
        }
        let chosen = |site: &&&'a P| matchers.iter().any(|m| m.matches(**site));
        Ok(sites.iter().filter(chosen).copied().collect())
    }

    /// The choice as messages show it.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::List(names) | Self::Names(names) => names.join(", "),
            Self::Regex(pattern) => pattern.clone(),
        }
    }
}

enum Matcher {
    Name(String),
    Glob(String, globset::GlobMatcher),
    Regex(String, regex::Regex),
    /// Linear maps inside layers whose path has one of these words in a component.
    Preset(String, &'static [&'static str]),
}

impl Matcher {
    fn parse(name: &str) -> Result<Self, PeftError> {
        Ok(match name {
            "all-linear" => Self::Preset(name.into(), &[""]),
            "attention" => Self::Preset(name.into(), &["attn", "attention"]),
            "mlp" => Self::Preset(name.into(), &["mlp", "feed_forward", "ffn"]),
            glob if glob.contains(['*', '?', '[', '{']) => {
                let parsed = globset::Glob::new(glob).map_err(|e| PeftError::Pattern {
                    pattern: glob.to_owned(),
                    why: e.to_string(),
                })?;
                Self::Glob(glob.into(), parsed.compile_matcher())
            }
            name => Self::Name(name.into()),
        })
    }

    fn regex(pattern: &str) -> Result<Self, PeftError> {
        Ok(Self::Regex(pattern.into(), whole_path(pattern)?))
    }

    fn text(&self) -> &str {
        match self {
            Self::Name(t) | Self::Glob(t, _) | Self::Regex(t, _) | Self::Preset(t, _) => t,
        }
    }

    fn matches<P: Place>(&self, place: &P) -> bool {
        let path = place.path();
        match self {
            Self::Name(name) => ends_with_name(path, name),
            Self::Glob(_, glob) => glob.is_match(path),
            Self::Regex(_, regex) => regex.is_match(path),
            Self::Preset(_, words) => {
                let part = |word: &&str| path.split('.').any(|part| part.contains(word));
                place.in_presets() && words.iter().any(part)
            }
        }
    }
}

/// The regular expression that a pattern of whole paths stands for.
pub(crate) fn whole_path(pattern: &str) -> Result<regex::Regex, PeftError> {
    let whole = regex::Regex::new(&format!("^(?:{pattern})$"));
    whole.map_err(|e| PeftError::Pattern {
        pattern: pattern.to_owned(),
        why: e.to_string(),
    })
}

/// Whether `path` is `name` or ends with it after a dot.
pub(crate) fn ends_with_name(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|head| head.ends_with('.'))
}

/// Module names like `name`.
pub(crate) fn near<P: Place>(name: &str, sites: &[&P]) -> String {
    let mut names: Vec<&str> = sites.iter().map(|s| last_part(s.path())).collect();
    names.sort_unstable();
    names.dedup();
    let wanted = last_part(name);
    names.sort_by(|a, b| {
        strsim::jaro_winkler(b, wanted).total_cmp(&strsim::jaro_winkler(a, wanted))
    });
    names.truncate(4);
    names.join(", ")
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The names that PEFT needs to choose exactly `chosen` out of the modules `all`: a module name where
/// all modules of that name are chosen, whole paths otherwise.
pub fn peft_names(chosen: &[String], all: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = chosen
        .iter()
        .map(|path| {
            let name = last_part(path);
            let mut named = all.iter().filter(|other| last_part(other) == name);
            match named.all(|other| chosen.iter().any(|path| path == other)) {
                true => name.to_owned(),
                false => path.clone(),
            }
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangent_ops::FrozenMatrix;

    fn sites() -> Vec<Site> {
        let site = |path: &str, kind| {
            Site::new(
                path.into(),
                kind,
                None,
                FrozenMatrix::from_values(vec![0.0], 1, 1),
            )
        };
        vec![
            site("model.embed_tokens", SiteKind::Embedding),
            site("model.layers.0.self_attn.q_proj", SiteKind::Linear),
            site("model.layers.0.mlp.up_proj", SiteKind::Linear),
            site("model.layers.1.self_attn.q_proj", SiteKind::Linear),
            site("lm_head", SiteKind::Head),
        ]
    }

    #[track_caller]
    fn check(targets: &Targets, want: &[&str]) {
        let sites = sites();
        let sites: Vec<&Site> = sites.iter().collect();
        let got = targets.select(&sites).unwrap();
        let got: Vec<&str> = got.iter().map(|s| s.path.as_str()).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn names_globs_presets_and_expressions_choose_sites() {
        let list = |names: &[&str]| Targets::List(names.iter().map(|n| (*n).to_owned()).collect());
        let (q0, q1) = (
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        );
        let up = "model.layers.0.mlp.up_proj";
        check(&list(&["q_proj"]), &[q0, q1]);
        check(&list(&["attention"]), &[q0, q1]);
        check(&list(&["mlp", "lm_head"]), &[up, "lm_head"]);
        check(&list(&["all-linear"]), &[q0, up, q1]);
        check(&list(&["model.layers.1.*"]), &[q1]);
        check(&Targets::Regex(r".*\.[01]\..*q_proj".into()), &[q0, q1]);
        // Of a file's names only those count that match, and a word is no preset.
        let names = ["q_proj", "c_attn", "mlp", "model.layers.1.*"].map(String::from);
        check(&Targets::Names(names.into()), &[q0, q1]);
        check(&Targets::Regex("c_attn".into()), &[]);
    }

    #[test]
    fn unknown_names_list_near_ones() {
        let sites = sites();
        let sites: Vec<&Site> = sites.iter().collect();
        let error = Targets::parse(&["qproj".into()])
            .select(&sites)
            .unwrap_err();
        assert!(error.to_string().contains("near: q_proj"), "{error}");
        // A suffix must begin after a dot.
        assert!(Targets::parse(&["proj".into()]).select(&sites).is_err());
    }

    #[test]
    fn peft_names_are_short_where_they_are_exact() {
        let sites = sites();
        let sites: Vec<&str> = sites.iter().map(|s| s.path.as_str()).collect();
        let up = "model.layers.0.mlp.up_proj".to_owned();
        let q1 = "model.layers.1.self_attn.q_proj".to_owned();
        assert_eq!(
            peft_names(&[up, q1.clone()], &sites),
            [q1.as_str(), "up_proj"]
        );
    }
}
