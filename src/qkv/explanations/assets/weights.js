// Attention weights as they are packed: bytes of the square root, deflated, in base64; inflated when looked at.

async function inflated(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Weights of `rows` x `columns` units, each row of at most 1. */
class Weights {
  constructor(bytes, rows, columns, scale = 1) {
    Object.assign(this, { bytes, rows, columns, scale });
  }

  static async unpack(text, rows, columns, scale = 1) {
    return new Weights(await inflated(text), rows, columns, scale);
  }

  /** From 0 to 1: how dark a weight is drawn, the square root of its share of the largest there can be. */
  shade(row, column) {
    return this.bytes[row * this.columns + column] / 255;
  }

  at(row, column) {
    return this.shade(row, column) ** 2 * this.scale;
  }

  row(row) {
    return Array.from({ length: this.columns }, (_, column) => this.at(row, column));
  }

  column(column) {
    return Array.from({ length: this.rows }, (_, row) => this.at(row, column));
  }
}

/** The attention of one stack of one explanation. */
class Stack {
  constructor(packed, explanation) {
    this.packed = packed;
    this.queries = explanation.sequences.find((one) => one.name === packed.queries);
    this.keys = explanation.sequences.find((one) => one.name === packed.keys);
    this.layers = packed.layers;
    this.heads = packed.heads;
    this.made = new Map();
  }

  /** The weights of a head; both are counted from 0 among those that are here. */
  async head(layer, head) {
    const key = `${layer} ${head}`;
    if (!this.made.has(key)) {
      const { units: rows } = this.queries, { units: columns } = this.keys;
      this.made.set(key, Weights.unpack(this.packed.matrices[layer][head], rows.length, columns.length));
    }
    return this.made.get(key);
  }

  /** All heads made small: a function from the number of a head, counted through the layers, to its bytes. */
  async thumbnails() {
    this.small ??= inflated(this.packed.thumbnails);
    const [rows, columns] = this.packed.thumbnail;
    const bytes = await this.small;
    const size = rows * columns;
    return (number) => bytes.subarray(number * size, (number + 1) * size);
  }
}

/** A colour of the style sheet as three bytes. */
function colour(name) {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  canvas.fillRect(0, 0, 1, 1);
  return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3);
}

/** Bytes as the opacity of one colour, a pixel each. */
function paintBytes(canvas, bytes, [red, green, blue]) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  bytes.forEach((opacity, i) => image.data.set([red, green, blue, opacity], 4 * i));
  context.putImageData(image, 0, 0);
}
