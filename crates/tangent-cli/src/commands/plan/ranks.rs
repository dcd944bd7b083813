//! `tangent plan --ranks-from`: a rank for each site from the meter's readings, for no more
//! parameters than one rank takes.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Map, Value, json};
use tangent_peft::init;
use tangent_peft::methods::{self, Common};
use tangent_train::config::decimal;
use tangent_train::meter::ranks::{Place, can_move, lost_shares, measured_ranks, ranks};
use tangent_train::plan::grouped;

use crate::commands::train::Prepared;
use crate::failure::Failure;
use crate::progress::say;

/// Ranks of sites, and the patterns that give them.
struct Choice {
    places: Vec<Place>,
    ranks: Vec<usize>,
    /// The one rank for all that takes as many parameters.
    uniform: usize,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
}

/// Prints ranks from the readings in `file`.
pub fn run(file: &Path, prepared: &Prepared, json: bool) -> Result<(), Failure> {
    let choice = Choice::new(file, prepared)?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", choice.to_json())?;
    } else {
        choice.print(&mut out)?;
    }
    Ok(())
}

impl Choice {
    fn new(file: &Path, prepared: &Prepared) -> Result<Self, Failure> {
        let config = &prepared.adapter_config;
        let method = methods::find(&config.method)?;
        if !method.reads.contains(&Common::Patterns) {
            return Err(Failure::Request(format!(
                "--ranks-from: method {} has no ranks of single sites (--rank-pattern)",
                method.id
            )));
        }
        if !can_move(method) {
            return Err(Failure::Request(format!(
                "--ranks-from: the parameters of method {} do not grow with the rank site by site, \
                 so that ranks cannot move between sites for as many of them",
                method.id
            )));
        }
        let shares = lost_shares(file)?;
        let trained = |path: &String| prepared.trained.iter().any(|site| site.path == *path);
        if let Some(other) = shares.keys().find(|path| !trained(path)) {
            return Err(Failure::Request(format!(
                "{}: {other} is not adapted here; give the model, the method and the modules of \
                 the run that was measured",
                file.display()
            )));
        }
        // What other methods adapt along has no rank here.
        let own = prepared.trained.iter().filter(|site| site.part == 0);
        let measured = measured_ranks(file)?;
        if measured.is_none() {
            say(format_args!(
                "{}: the ranks of the run that was measured are not known: no run.json beside it tells \
                 them, or its start values moved them; its readings are taken to be of rank {} \
                 everywhere",
                file.display(),
                config.rank
            ));
        }
        let mut places = vec![];
        for site in own {
            let (Some(lost), Some(cost)) = (shares.get(&site.path), site.of_one_rank()) else {
                continue;
            };
            places.push(Place {
                site: site.path.clone(),
                shape: site.shape,
                cost,
                lost: *lost,
                measured: measured.as_ref().unwrap_or(config).rank_at(&site.path)?,
            });
        }
        let ranks = ranks(&places, config.rank);
        let of_sites = places.iter().map(|place| place.site.clone());
        let mut chosen = config.clone();
        init::ranks::assign(
            &mut chosen,
            &of_sites.zip(ranks.clone()).collect::<Vec<_>>(),
        )?;
        init::check(&chosen, &prepared.opened.model.sites())?;
        let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
        for (place, &rank) in places.iter().zip(&ranks) {
            if rank != config.rank {
                rank_pattern.insert(place.site.clone(), json!(rank));
                // The scaling stays what it was.
                let divisor = match config.use_rslora {
                    true => (rank as f32).sqrt(),
                    false => rank as f32,
                };
                let alpha = config.scaling_at(&place.site)? * divisor;
                alpha_pattern.insert(place.site.clone(), decimal(alpha));
            }
        }
        if !alpha_pattern.is_empty() {
            // The first match counts, so what was typed is for the other sites.
            for (name, alpha) in &config.alpha_pattern {
                alpha_pattern.entry(name).or_insert(decimal(*alpha));
            }
        }
        Ok(Self {
            places,
            ranks,
            uniform: config.rank,
            rank_pattern,
            alpha_pattern,
        })
    }

    /// Parameters of these ranks, and of one rank for all.
    fn parameters(&self) -> (usize, usize) {
        let costs = || self.places.iter().map(|place| place.cost);
        let chosen = costs().zip(&self.ranks).map(|(cost, rank)| cost * rank);
        (chosen.sum(), costs().sum::<usize>() * self.uniform)
    }

    fn to_json(&self) -> Value {
        let (parameters, uniform) = self.parameters();
        let site = |(place, rank): (&Place, &usize)| {
            json!({
                "site": place.site,
                "shape": [place.shape.0, place.shape.1],
                "lost": place.lost,
                "measured_rank": place.measured,
                "rank": rank,
            })
        };
        let sites: Vec<Value> = self.places.iter().zip(&self.ranks).map(site).collect();
        json!({
            "sites": sites,
            "rank": self.uniform,
            "parameters": parameters,
            "parameters_of_one_rank": uniform,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        })
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let longest = self.places.iter().map(|p| p.site.len()).max().unwrap_or(0);
        writeln!(out, "{:<longest$}  {:<13}     lost   rank", "site", "shape")?;
        for (place, rank) in self.places.iter().zip(&self.ranks) {
            let (rows, cols) = place.shape;
            let shape = format!("{rows}x{cols}");
            let lost = 100.0 * place.lost;
            writeln!(
                out,
                "{:<longest$}  {shape:<13} {lost:>6.2} % {rank:>6}",
                place.site
            )?;
        }
        let (parameters, uniform) = self.parameters();
        writeln!(
            out,
            "\nlost: share of the squared gradients of a step, of all sites, that the adapter could \
             not follow\nat this one; mean over the readings"
        )?;
        writeln!(
            out,
            "\n{} parameters; rank {} for all sites takes {}",
            grouped(parameters),
            self.uniform,
            grouped(uniform)
        )?;
        if self.rank_pattern.is_empty() {
            return writeln!(out, "Rank {} for all sites is as good.", self.uniform);
        }
        let pattern = |map: &Map<String, Value>| Value::Object(map.clone()).to_string();
        writeln!(
            out,
            "\n--rank-pattern '{}' \\\n--alpha-pattern '{}'",
            pattern(&self.rank_pattern),
            pattern(&self.alpha_pattern)
        )
    }
}
