"use strict";
// The numbers in #data, and what all panels share. `at` is the position that is looked at: the model has read tokens 0
// to `at` of the W shown ones, and predicts the one after it. inline.py joins the files of this folder to one script.

/** @typedef {{ type: "u1" | "i4" | "f4", shape: number[], data: string }} Packed an array of inline.py */
/** @typedef {Float32Array & { shape: number[] }} Numbers an array here; of bytes or int32 as well */
/** @typedef {{ ids: Packed, p: Packed }} Likeliest the likeliest tokens (W, n) and their probabilities */
/**
 * The numbers of panels.py. Tokens are places in `vocabulary`.
 * @typedef {object} Data
 * @property {string[]} vocabulary
 * @property {{ source: string, precision: string, calls: number, heads: number } & Limits} model
 * @property {{ ids: Packed, surprise: Packed, first: number, prompt: number, ended: boolean, at: number }} text
 * @property {{ parts: Record<string, Packed>, channels: number } | null} embedding
 * @property {{ calls: number[], heads: number[], weights: Weights, error: number, sums: number }} attention
 * @property {{ at: (Likeliest & { next: Packed } | null)[] }} layers
 * @property {Likeliest} next
 * @property {{ bytes: number }} cache
 * @property {{ settings: Record<string, number>, example: boolean, at: Stages[] }} sampler
 * @property {{ name: string, kl: Packed, p: Packed }} [reference]
 */
/** @typedef {{ tokens: number, context: number }} Limits */
/** @typedef {{ low: number, high: number, columns: number, codes: Packed }} Weights of attention, without zeros */
/** @typedef {{ names: string[], kept: number[], ids: Packed, p: Packed }} Stages of the sampler */

const byId = (id) => document.getElementById(id);
const canvasOf = (id) => /** @type {HTMLCanvasElement} */ (byId(id));
const selectOf = (id) => /** @type {HTMLSelectElement} */ (byId(id));
const slider = /** @type {HTMLInputElement} */ (byId("slider"));
/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} name
 * @returns {HTMLElementTagNameMap[K]}
 */
const make = (name, text = "", kind = "") =>
  Object.assign(document.createElement(name), { textContent: text, className: kind });
const percent = (p) => (!p ? "0 %" : p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
const range = (length) => [...Array(length).keys()];
const spaced = (name) => name.replaceAll("_", " ");

/** @type {(packed: Packed) => Numbers} */
function array({ type, shape, data: text }) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const numbers = type === "u1" ? bytes : new (type === "i4" ? Int32Array : Float32Array)(bytes.buffer);
  return /** @type {Numbers} */ (Object.assign(numbers, { shape }));
}

/** @type {Data} */
const data = JSON.parse(byId("data").textContent);
const { first, prompt: promptTokens, ended } = data.text;
const ids = array(data.text.ids);
const surprise = array(data.text.surprise);
const W = surprise.length;
const last = W - 1;
const shown = (place) => data.vocabulary[place];
const token = (place) => shown(ids[place]);
const number = (place) => first + place + 1;
let at = data.text.at;
